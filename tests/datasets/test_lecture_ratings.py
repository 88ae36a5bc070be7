"""InstEval: the table's own numbers, and damage named with line and column."""

import gzip

import numpy as np
import pytest

import fedjax_lab as fl

HEADER = "student,lecturer,student_age,lecture_age,service,department,rating\n"
ROWS = "1,1002,2,2,0,2,5\n1,7,2,1,1,6,2\n3,1002,4,2,0,2,5\n"


def _write(tmp_path, content):
    path = tmp_path / "insteval.csv.gz"
    path.write_bytes(gzip.compress(content.encode()))
    return path


def test_the_real_table(data_dir):
    train, test = fl.datasets.insteval(data_dir)
    assert train.num_clients == 2972 and train.num_examples + test.num_examples == 73_421
    lecturers = np.concatenate([train.arrays["lecturer"], test.arrays["lecturer"]])
    assert len(np.unique(lecturers)) == 1128 and lecturers.max() == 1127
    y = np.concatenate([train.arrays["y"], test.arrays["y"]])
    assert y.dtype == np.float32 and set(y) == {1, 2, 3, 4, 5}
    assert abs(y.mean(dtype=np.float64) - 3.2057) < 1e-3  # summed up with another reader
    assert abs(test.num_examples / 73_421 - 0.2) < 0.01


def test_a_small_table(tmp_path):
    _write(tmp_path, HEADER + ROWS)
    train, test = fl.datasets.insteval(tmp_path, test_fraction=0.5)
    assert list(train.ids) == [1, 3] and train.sizes.tolist() == [1, 1] and test.sizes.tolist() == [1, 0]
    whole, mask = train.client(3).full()
    row = {name: np.asarray(values)[np.asarray(mask)].tolist() for name, values in whole.items()}
    assert row == {
        "y": [5.0], "lecturer": [1], "student_age": [4], "lecture_age": [2], "service": [0], "department": [2]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + ROWS + "4,7,2,1,0,2,6\n", "line 5, column 'rating': 6 is not a rating from 1 to 5"),
        (HEADER + ROWS + "4,7,2,1,0,2\n", "line 5: 6 cells, but the header names 7"),
        (HEADER + ROWS + "4,7.5,2,1,0,2,3\n", "line 5, column 'lecturer': 7.5 is no 32-bit integer"),
        (HEADER.replace("lecturer", "teacher") + ROWS, "no column 'lecturer'"),
        (HEADER, "no rows"),
    ],
)
def test_bad_tables_are_named(tmp_path, content, message):
    path = _write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        fl.datasets.insteval(tmp_path)
    assert str(path) in str(error.value)


def test_a_missing_table_is_answered_with_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"insteval.csv.gz is in none of the folders .*lme4"):
        fl.datasets.insteval(tmp_path)
