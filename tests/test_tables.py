"""CSV, Parquet and data frames: contents, and every kind of damage with its line and column."""

import gzip

import numpy as np
import pytest

import fedjax_lab as fl
from tests.damage import flips, outcomes, truncations

pd = pytest.importorskip("pandas")

COLUMNS = {"client": "user", "features": ["age", "dose"], "label": "sick"}
CSV = "user,age,dose,sick\nbo,31,0.5,1\nann,40,-2e-1,0\nbo,52,3,1\n"


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(CSV)
    return path


def _read(path, **changes):
    return fl.FederatedData.from_table(path, **(COLUMNS | changes))


def _is_the_table(data):
    assert list(data.ids) == ["ann", "bo"]
    x = np.array([[40, -0.2], [31, 0.5], [52, 3]], np.float32)
    np.testing.assert_array_equal(data.arrays["x"], x)
    np.testing.assert_array_equal(data.arrays["y"], [0, 1, 1])
    assert data.arrays["y"].dtype == np.int32 and data.arrays["x"].dtype == np.float32


def test_the_same_table_from_every_source(csv, tmp_path):
    _is_the_table(_read(csv))
    _is_the_table(_read(str(csv)))
    packed = tmp_path / "data.csv.gz"
    packed.write_bytes(gzip.compress(CSV.encode()))
    _is_the_table(_read(packed))
    frame = pd.read_csv(csv)
    _is_the_table(_read(frame))
    _is_the_table(_read(frame.convert_dtypes()))  # pandas' own types
    _is_the_table(_read(frame.astype({"user": "category"})))
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "data.parquet")
    _is_the_table(_read(tmp_path / "data.parquet"))


def test_one_feature_is_still_a_matrix(csv):
    assert _read(csv, features="age").arrays["x"].shape == (3, 1)


def test_real_labels_are_regression_and_booleans_are_integers(csv):
    assert _read(csv, label="dose").arrays["y"].dtype == np.float32
    csv.write_text("user,age,dose,sick\nbo,1,2,True\nann,3,4,false\n")
    y = _read(csv).arrays["y"]
    assert y.dtype == np.int32 and y.tolist() == [0, 1]
    frame = pd.DataFrame({"user": [1, 2], "age": [1, 2], "dose": [1, 2], "sick": [True, False]})
    assert _read(frame).arrays["y"].tolist() == [1, 0]


def test_ids_are_numbers_only_if_nothing_is_lost(csv):
    csv.write_text("user,age,dose,sick\n10,1,2,0\n9,1,2,0\n")
    assert list(_read(csv).ids) == [9, 10]
    csv.write_text("user,age,dose,sick\n010,1,2,0\n10,1,2,0\n")
    assert list(_read(csv).ids) == ["010", "10"]
    csv.write_text("user,age,dose,sick\nNA,1,2,0\nnull,1,2,0\n")
    assert list(_read(csv).ids) == ["NA", "null"]


def test_quotes_byte_order_mark_and_line_ends(csv):
    csv.write_bytes(b'\xef\xbb\xbfuser,age,dose,sick\r\n"b,o",1,2,0\r\n"a\nb",1,2,x\r\n')
    with pytest.raises(ValueError, match=r"data.csv, line 4, column 'sick': 'x'"):  # the quoted line end counts
        _read(csv)
    csv.write_bytes(csv.read_bytes().replace(b"x\r\n", b"1\r\n\r\n"))
    assert list(_read(csv).ids) == ["a\nb", "b,o"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("bo,1,,0", "line 5, column 'dose': the cell is empty"),
        ("bo,1,x,0", "line 5, column 'dose': 'x' is not a finite number; encode text"),
        ("bo,nan,1,0", "line 5, column 'age': the cell is empty"),
        ("bo,inf,1,0", "line 5, column 'age': 'inf' is not a finite number"),
        ("bo,1e39,1,0", "line 5, column 'age': 1e.39 is not a finite 32-bit number"),
        ("bo,1_0,1,0", "line 5, column 'age': '1_0' is not"),
        ("bo,1,1,cat", "line 5, column 'sick': 'cat' is not a finite number; encode text"),
        ("bo,1,1,3000000000", "line 5, column 'sick': 3e.09 is no 32-bit integer"),
        (",1,1,0", "line 5, column 'user': no client is named"),
        ("bo,1,1", "line 5: 3 cells, but the header names 4 columns"),
        ("bo,1,1,0,7", "line 5: 5 cells, but the header names 4 columns"),
        ("\nbo,1,1,0", "line 5: 0 cells"),
        ('bo,1,"1,0', "line 5: no CSV table: unexpected end of data"),
    ],
)
def test_a_bad_row_is_named_with_its_line(csv, rows, message):
    csv.write_text(CSV + rows + "\n")
    with pytest.raises(ValueError, match=message) as error:
        _read(csv)
    assert str(csv) in str(error.value)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("", {}, "the file is empty"),
        ("\n\n", {}, "the table is empty"),
        ("user,age,dose,sick\n", {}, "the table has no rows"),
        (CSV, {"client": "usr"}, "no column 'usr' among .*; did you mean 'user'"),
        (CSV, {"features": ["age", "does"]}, "did you mean 'dose'"),
        (CSV, {"label": "y"}, "no column 'y' among"),
        (CSV, {"features": []}, "features names no column"),
        ("user,age,age,sick\nbo,1,1,1\n", {}, "line 1: more than one column is called 'age'"),
    ],
)
def test_a_bad_table_or_column_name_is_refused(csv, content, changes, message):
    csv.write_text(content)
    with pytest.raises(ValueError, match=message):
        _read(csv, **changes)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"user": ["a"], "age": [np.nan], "dose": [1], "sick": [0]}), "row 0, column 'age'"),
        (pd.DataFrame({"user": ["a", None], "age": [1, 2], "dose": [1, 2], "sick": [0, 0]}), "row 1, column 'user'"),
        (pd.DataFrame({"user": ["a"], "age": [["b"]], "dose": [1], "sick": [0]}), "row 0, column 'age'"),
        (pd.DataFrame({"user": [], "age": [], "dose": [], "sick": []}), "no rows"),
        (
            pd.DataFrame([[1, 2, 3, 4, 5]], columns=["user", "age", "dose", "sick", "sick"]),
            "more than one column 'sick'",
        ),
        ([1, 2], "a path or a pandas DataFrame; got list"),
        ("table.xlsx", "must be a .csv, .csv.gz or .parquet file"),
    ],
)
def test_a_bad_frame_is_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        _read(frame)


def test_a_missing_file_is_named_with_the_nearest(csv):
    with pytest.raises(FileNotFoundError, match=r"dat.csv; did you mean 'data.csv'"):
        _read(csv.with_name("dat.csv"))


def _same(a, b):
    return list(a.ids) == list(b.ids) and all((a.arrays[n] == b.arrays[n]).all() for n in ("x", "y"))


def _shape(data):
    return data.num_examples, data.arrays["x"].shape


def test_50_flips_and_truncations_of_a_gzipped_csv_are_named_or_harmless(csv, tmp_path):
    path = tmp_path / "data.csv.gz"
    path.write_bytes(gzip.compress(CSV.encode(), mtime=0))
    intact = _read(path)
    for copies in (truncations(path.read_bytes()), flips(path.read_bytes())):
        for what, result in outcomes(path, copies, lambda: _read(path)):
            named = isinstance(result, ValueError) and str(path) in str(result)
            assert named or _same(result, intact), what


def test_50_truncations_of_a_csv_are_named_or_leave_whole_rows(csv):
    # A CSV file has no checksum and no end mark: what is cut behind a complete row, or within the digits
    # of its last number, is a table as good as any. All else is named.
    content = csv.read_bytes()
    named = 0
    for what, result in outcomes(csv, truncations(content), lambda: _read(csv)):
        if isinstance(result, ValueError):
            named += 1
            assert str(csv) in str(result), what
        else:
            length = int(what.split()[2])
            assert content[:length].decode().rstrip("\n").split("\n")[-1].count(",") == 3, what
    assert named > 25


def test_50_flips_of_a_csv_are_named_or_leave_a_table(csv):
    # A flipped digit, sign or letter of a name is another valid table: nothing in the format tells.
    content, intact = csv.read_bytes(), _read(csv)
    named = 0
    for what, result in outcomes(csv, flips(content, 100), lambda: _read(csv)):
        if isinstance(result, ValueError):
            named += 1
            assert str(csv) in str(result), what
        else:
            assert _shape(result) == _shape(intact), what
    assert named > 40


@pytest.mark.parametrize("checksum", [True, False])
def test_50_flips_and_truncations_of_a_parquet_file(tmp_path, checksum):
    # Checksums of pages are the writer's choice. With them, a flip in the values is named; without, it
    # may be another number. A flip in what is not covered (statistics, padding) is harmless, one in a
    # name of the footer's schema leaves a table that lacks a column, which is named as such.
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rng = np.random.default_rng(0)
    table = arrow.table(
        {
            "user": rng.integers(0, 5, 400), "age": rng.random(400), "dose": rng.random(400),
            "sick": rng.integers(0, 2, 400),
        }
    )  # fmt: skip
    path = tmp_path / "data.parquet"
    parquet.write_table(table, path, write_page_checksum=checksum)
    intact = _read(path)
    for what, error in outcomes(path, truncations(path.read_bytes()), lambda: _read(path)):
        assert isinstance(error, ValueError) and str(path) in str(error), what
    different = 0
    for what, result in outcomes(path, flips(path.read_bytes()), lambda: _read(path)):
        if isinstance(result, ValueError):
            assert str(path) in str(result), what
        else:
            different += not _same(result, intact)
            assert _shape(result) == _shape(intact), what
    assert different == 0 or not checksum
