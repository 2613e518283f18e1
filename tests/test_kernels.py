"""Every compiled kernel against its plain form, and the plain forms against their definitions."""
