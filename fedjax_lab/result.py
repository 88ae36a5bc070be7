"""Result: what a run came to."""

from typing import Any, NamedTuple

from fedjax_lab.records import Record

PyTree = Any


class Result(NamedTuple):
    """What a run came to.

    Attributes:
      params: of the server's model; the server's state where there is no model.
      state: the process's whole state.
      metrics: one plain dict a round, ``{"round": rounds done, ...}``; with an evaluation also one for
        round 0. At logging points they hold the evaluation too.
      uplink_bytes, downlink_bytes: exact totals over the whole run, resumed parts and probes included.
      rounds: rounds done.
      stopped: why the run ended.
      seconds: wall time of the rounds and evaluations, over all sessions of a resumed run.
      compile_seconds: wall time of building the state and of everything's first call, all sessions.
    """

    params: PyTree
    state: PyTree
    metrics: list[Record]
    uplink_bytes: int
    downlink_bytes: int
    rounds: int
    stopped: str
    seconds: float
    compile_seconds: float

    def plot(self, *names: str, x: str = "round"):
        """Curves of metrics, a panel each; see :func:`fedjax_lab.plots.plot_metrics`."""
        from fedjax_lab.plots import plot_metrics

        return plot_metrics(self.metrics, *names, x=x)

    def __repr__(self) -> str:
        last = {n: v for n, v in self.metrics[-1].items() if n != "round"} if self.metrics else {}
        return (
            f"Result({self.rounds} rounds, {self.stopped}, {self.uplink_bytes:,} bytes up, "
            f"{self.downlink_bytes:,} down, {self.seconds:.1f} s, last record {last})"
        )
