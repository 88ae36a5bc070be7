"""InstEval: lecture ratings by students, a naturally federated table of real people."""

import os

import numpy as np

from fedjax_lab import checks, tables
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.datasets import stored_files

_FILES = ("insteval.csv.gz", "insteval.csv")
_COVARIATES = ("student_age", "lecture_age", "service", "department")


def insteval(data_dir: str | os.PathLike | None = None, *, test_fraction: float = 0.2, seed: int = 0) -> Split:
    """73,421 ratings of 1,128 lecturers by 2,972 students of ETH Zurich; a client is a student.

    Source: the data set InstEval of the R package lme4 (Bates et al. 2015), as a CSV file with the header
    ``student,lecturer,student_age,lecture_age,service,department,rating``. It can be exported there with
    ``write.csv(lme4::InstEval, "insteval.csv")`` after renaming its columns.

    Args:
      data_dir: the folder of ``insteval.csv.gz`` (or ``insteval.csv``), or one with a folder
        ``insteval``; by default FEDJAX_LAB_DATA or ``~/.cache/fedjax_lab``.
      test_fraction: the share of each student's ratings that is kept for testing.
      seed: of that split.

    Returns:
      ``Split(train, test)`` with the students' numbers as ids and the fields

      - ``y: float32``, the rating, 1 (poor) to 5 (very good);
      - ``lecturer: int32``, numbered ``0..lecturers-1`` in the order of the table's numbers;
      - ``student_age: int32``, semesters; ``lecture_age: int32``, semesters since the lecture;
        ``service: int32``, 1 for a lecture for another department; ``department: int32``, as they are.

    Raises:
      FileNotFoundError: the file is in none of the folders.
      ValueError: naming file, line and column: damage, a missing column, a rating outside 1 to 5.
    """
    checks.shares(test_fraction)
    folders = stored_files.data_folders(data_dir, "insteval")
    path = next((f / name for f in folders for name in _FILES if (f / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"insteval.csv.gz is in none of the folders {', '.join(map(str, folders))}; put it in one, or pass its "
            "folder as data_dir. It is the data set InstEval of the R package lme4, as a CSV file with the columns "
            f"student, lecturer, {', '.join(_COVARIATES)}, rating"
        )
    table = tables.load(path)
    rating = tables.numbers(table, "rating")
    outside = np.flatnonzero((rating < 1) | (rating > 5))
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"{table.at(row, 'rating')}: {rating[row]:g} is not a rating from 1 to 5")
    _, lecturer = np.unique(tables.integers(table, "lecturer"), return_inverse=True)
    arrays = {"y": rating.astype(np.float32), "lecturer": lecturer.astype(np.int32)}
    arrays |= {name: tables.integers(table, name) for name in _COVARIATES}
    students = tables.identifiers(table, "student")
    return Split(*FederatedData.from_arrays(arrays, students).split(1 - test_fraction, seed))
