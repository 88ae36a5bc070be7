"""What every experiment's folder must hold, checked from its files alone."""

import json
from pathlib import Path

FIELDS = {"name", "paper", "ours", "tolerance", "ok", "source"}


def read_folder(out: Path) -> tuple[dict, dict[str, list[dict]]]:
    """The summary, and the records of each run; after checking what holds for all experiments."""
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.md"):
        assert (out / name).stat().st_size > 2, name
    pictures = list(out.glob("*.png"))
    assert pictures and all(p.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for p in pictures)
    assert all(f"({p.name})" in (out / "report.md").read_text() for p in pictures)
    summary = json.loads((out / "summary.json").read_text(), parse_constant=_refuse)
    runs: dict[str, list[dict]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=_refuse)
        runs.setdefault(record.pop("run"), []).append(record)
    assert list(runs) == [row["run"] for row in summary["results"]]
    for row in summary["results"]:
        assert [r["round"] for r in runs[row["run"]]] == list(range(row["rounds"] + 1))
        assert row["uplink_bytes"] == sum(r.get("uplink_bytes", 0) for r in runs[row["run"]])
    assert all(set(check) == FIELDS and isinstance(check["ok"], bool) for check in summary["checks"])
    assert all(set(check) == (FIELDS | {"reason"}) - {"ours", "ok"} and check["reason"] for check in summary["skipped"])
    return summary, runs


def without_times(summary: dict) -> dict:
    """The summary without what differs from one session to the next."""
    rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in summary["results"]]
    return summary | {"results": rows, "seconds": 0}


def _refuse(constant):
    raise AssertionError(f"{constant} in a JSON file")
