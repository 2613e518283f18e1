"""Predictions for cards (lowres/probe/roofline.py): their terms compared with numbers by hand."""

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
    moved = {fused: roofline.traced_update(config, fused) for fused in (True, False)}
    # refused gradients set to zero 8, read for projections and norms 8; set to zero and read for the norm of
    # all 8; gradient, and code read and written 6
    assert moved[True].bytes == pytest.approx(30, rel=0.01)
    terms = [
        roofline.seconds(card, version, config, plan, WHOLE, moved[version.fused])
        for version in roofline.VERSIONS
    ]
    eager, fused, mixed, int8 = terms
    # 12.95 forward, 10.07 again, 25.90 backward, in 10^9 operations a token
    assert eager["products"] == fused["products"] == pytest.approx(131072 * 48.92e9 / 165e12, rel=1e-3)
    assert int8["products"] == pytest.approx(fused["products"] * 165 / 661)
    assert mixed["products"] == pytest.approx(131072 * (35.97e9 / 661e12 + 12.95e9 / 165e12), rel=1e-3)
    assert fused["attention"] == pytest.approx(131072 * 2.416e9 / 165e12, rel=1e-3)
    assert all(own["head"] == fused["head"] and own["attention"] == fused["attention"] for own in terms)
    assert eager["memory traffic"] > mixed["memory traffic"] > fused["memory traffic"]
    assert eager["update"] > fused["update"] and fused["transfers"] > 0
    assert fused["products of the update"] == 0

    found = roofline.predict(fused, 131072)
    assert found.limit == "products" and found.tokens_per_s < 131072 / fused["products"]
    slow = fused | {"transfers": 1e3}
    assert roofline.predict(slow, 131072).limit == "transfers"
    assert roofline.predict(slow, 131072).tokens_per_s == pytest.approx(131.072)
    # a small model waits for Python: two blocks, and a piece each of 90 kernels and some of the update
    small = {"products": 1e-4, "update": 1e-4, "transfers": 0.0, "launches": 4e-3}
    assert roofline.predict(small, 4096).limit == "launches"
    assert roofline.predict(small, 4096).step_s == pytest.approx(4e-3)
    pieces = 64 / plan.micro_batch
    assert fused["launches"] == pytest.approx(32 * (pieces * 90 + moved[True].operations) * 8e-6)
    assert 50 < moved[True].operations < moved[False].operations


def test_the_update_of_muon() -> None:
    card = roofline.CARDS["RTX 4090"]
    muon = roofline.config_of(card, ["optim.name=muon", "memory.moments=fp32"])
    update = roofline.traced_update(muon, True)
    # momentum and direction 12 each, norm 4, quotient 6, five times the result of a product copied 20, the
    # last one copied to the gradient 6 and divided there 8; and, as above, 8 + 8 + 6
    assert update.bytes == pytest.approx(90, rel=0.01)
    plan = make_plan(roofline.config_of(card), torch.device("cuda"))
    terms = roofline.seconds(card, roofline.VERSIONS[1], muon, plan, WHOLE, update)
    # 4 m^2 n + 2 m^3, five times
    layer = 5 * (4 * 6 * 4096**3 + 3 * (4 * 4096**2 * 11008 + 2 * 4096**3))
    assert terms["products of the update"] == pytest.approx(32 * layer / 165e12)
