from training.evaluation.tables import format_tables, group_rows


def test_a_report_has_one_table_for_rows_with_the_same_columns() -> None:
    report = format_tables({"a": {"x": 0.5}, "b": {"x": 1.0}, "c": {"y": 0.25}})
    assert report.splitlines() == [
        "|  | x |",
        "| --- | --- |",
        "| a | 0.500 |",
        "| b | 1.000 |",
        "",
        "|  | y |",
        "| --- | --- |",
        "| c | 0.250 |",
    ]


def test_rows_with_the_same_columns_share_a_table() -> None:
    tables = group_rows({"a": {"x": 1.0}, "b": {"x": 2.0}, "c": {"y": 3.0}})
    assert [(table.columns, [name for name, _ in table.rows]) for table in tables] == [
        (("x",), ["a", "b"]),
        (("y",), ["c"]),
    ]
