"""The closed forms of quantizers' errors: the formulas by hand, the verdicts, and a part of it end to end."""

import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli
from experiments import compression_closed_forms as forms
from tests.experiments.checking import read_folder


def test_the_formulas_by_hand():
    v = np.array([0.6, -0.8])
    # s = 1: f = .6 and .8, each f (1 - f); s = 3: 1.8 and 2.4 leave .8 and .4.
    assert forms.qsgd_error(1)(v) == pytest.approx(0.24 + 0.16)
    assert forms.qsgd_error(3)(v) == pytest.approx((0.16 + 0.24) / 9)
    assert forms.terngrad_error(v) == pytest.approx(0.6 * 0.2)


def test_every_published_figure_has_a_case():
    cases = {c.name: c.expected for c in forms.all_cases()}
    published = [c for c in cases.values() if not callable(c)]
    np.testing.assert_allclose(
        published, [0.36338, 0.570796, 0.5708, 0.1331, 0.0358, 0.0096, 0.546, 0.564, 0.569, 0.5705], rtol=1e-4
    )
    assert sum(name.startswith("QSGD") for name in cases) == 8
    assert sum(name.startswith("TernGrad") for name in cases) == 2


def test_a_quantizer_with_another_error_is_found_out():
    case = forms.Case("", fl.wire.terngrad(), forms.normal(64), forms.terngrad_error, 0, "")
    good = forms.measure(case, 2000, 0)
    assert forms.check(case, good, "").ok
    assert not forms.check(case, good._replace(mean=good.expected * 1.021), "").ok
    assert not forms.check(case, good._replace(mean=good.expected * 0.979), "").ok
    assert forms.check(case, good, "too few").ok is None
    assert good.size == 17  # 64 trits in 13 bytes, and the largest entry


@pytest.mark.slow
def test_what_it_writes_holds_together(tmp_path, monkeypatch):
    few = [c for c in forms.all_cases() if c.name in ("QSGD, s = 3, 1024 normal", "DRIVE, biased")]
    monkeypatch.setattr(forms, "all_cases", lambda: few)
    assert cli.main(["reproduce", "compression_closed_forms", "--quick", "--no-cache", "--out", str(tmp_path)]) == 0
    summary, runs = read_folder(tmp_path / "compression_closed_forms")
    assert summary["checks"] == [] and {c["reason"] for c in summary["skipped"]} == {"effort is 0.001 instead of 1"}
    assert list(runs) == ["DRIVE, biased", "QSGD, s = 3, 1024 normal"]
    assert summary["results"][0]["error"] == pytest.approx(1 - 2 / np.pi, rel=0.05)
    assert cli.main(["run", "compression_closed_forms", "--effort", "0"]) == 2
