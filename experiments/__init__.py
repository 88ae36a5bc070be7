"""Experiments: one module a paper or a study, and one command for all, ``python -m experiments``.

An experiment is a module of this package with

- a docstring, whose first line ``list`` shows;
- ``Config``, a frozen dataclass of documented settings, which become the command line;
- ``main(config, out) -> summary``, which trains and writes metrics, pictures and a report into a folder;
- ``QUICK``, a Config that takes seconds and shows nothing but that everything works;
- ``PAPER``, the Config of the published figures that ``reproduce`` compares with, if there are any.
"""
