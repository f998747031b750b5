"""What `run.py` takes from the reports of its processes."""

from __future__ import annotations

from xml.etree import ElementTree

from peers import OPS
from results import Run, rows
from run import Measurement

SHAPE = str(OPS["int8_linear"].shapes[0])
PEERS = list(OPS["int8_linear"].peers)
REPORT = f"""<testsuites><testsuite>
<testcase name="test_int8_linear[{SHAPE}-float32-{PEERS[3]}]">
<skipped message="no such engine">file:1</skipped></testcase>
<testcase name="test_int8_linear[{SHAPE}-float32-{PEERS[3]}]" />
</testsuite></testsuites>"""
FAILURE = f"""<testsuites><testsuite><testcase name="test_int8_linear[{SHAPE}-float32-{PEERS[4]}]">
<failure message="AssertionError: wrong&#10;more">where</failure></testcase></testsuite></testsuites>"""


def times(peer: str, milliseconds: float) -> dict:
    info = {"shape": SHAPE, "peer": peer, "macs": 10**6, "relative_error": 0.01, "cosine": None, "path": "avx2"}
    info["seconds"] = milliseconds / 1e3
    figures = {"ghz": None, "macs_per_cycle": None, "read_gb_s": 2.0}
    return {"extra_info": info | figures}


def test_rounds_skips_and_failures_become_rows():
    measurement = Measurement("int8_linear", patience=0)
    for noisy in (False, True):
        measurement._read_times(times(PEERS[1], 2.0), noisy)
        measurement._read_times(times(PEERS[0], 4.0), noisy)
        measurement._read_report(ElementTree.fromstring(REPORT), PEERS[3])
    measurement._read_report(ElementTree.fromstring(FAILURE), PEERS[4])
    base, fast, skipped, failed = measurement.results()
    assert [base.peer, fast.peer, skipped.peer, failed.peer] == [PEERS[0], PEERS[1], PEERS[3], PEERS[4]]
    assert fast.speedups == [2.0, 2.0]
    assert fast.noisy == [False, True]
    assert fast.ghz is None
    assert skipped.not_run == "no such engine"
    assert failed.not_run == "FAILED: AssertionError: wrong"
    assert measurement.failures == [f"{PEERS[4]} at {SHAPE}: where"]
    assert [line[-1] for line in rows(Run("int8_linear", {}, measurement.results()))][2:] == [
        "not run: no such engine",
        "not run: FAILED: AssertionError: wrong",
    ]
