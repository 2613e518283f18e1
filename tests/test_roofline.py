"""scripts/roofline.py: its terms compared with numbers by hand."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import roofline  # noqa: E402

from lowres.memory import make_plan  # noqa: E402

WHOLE = roofline.Assumed(bf16=1, int8=1, attention=1, bandwidth=1)


def test_terms_and_limits() -> None:
    card = roofline.CARDS["RTX 4090"]
    config = roofline.config_of(card)
    plan = make_plan(config, torch.device("cuda"))
    terms = [roofline.seconds(card, version, config, plan, WHOLE) for version in roofline.VERSIONS]
    eager, fused, mixed, int8 = terms
    # 12.95 forward, 10.07 again, 25.90 backward, in 10^9 operations a token
    assert eager["products"] == fused["products"] == pytest.approx(131072 * 48.92e9 / 165e12, rel=1e-3)
    assert int8["products"] == pytest.approx(fused["products"] * 165 / 661)
    assert mixed["products"] == pytest.approx(131072 * (35.97e9 / 661e12 + 12.95e9 / 165e12), rel=1e-3)
    assert fused["attention"] == pytest.approx(131072 * 2.416e9 / 165e12, rel=1e-3)
    assert all(own["head"] == fused["head"] and own["attention"] == fused["attention"] for own in terms)
    assert eager["memory traffic"] > mixed["memory traffic"] > fused["memory traffic"]
    assert eager["update"] > fused["update"] and fused["transfers"] > 0

    found = roofline.predict(fused, 131072)
    assert found["limit"] == "products" and found["tokens_per_s"] < 131072 / fused["products"]
    slow = fused | {"transfers": 1e3}
    assert roofline.predict(slow, 131072)["limit"] == "transfers"
    assert roofline.predict(slow, 131072)["tokens_per_s"] == pytest.approx(131.072)
