from training.tiny.report.charts import draw_curves


def test_curves_follow_the_page_s_colours_and_go_through_every_step() -> None:
    history = [{"step": float(k), "loss": 1.0 / k} for k in range(1, 9)]
    (chart,) = draw_curves(history, "stage1")
    assert "currentColor" in chart
    assert "var(--accent)" in chart
    assert "#010203" not in chart
    assert 'aria-label="stage1: loss, 1 to 0.125 over 8 steps"' in chart
    assert draw_curves([], "stage1") == []
