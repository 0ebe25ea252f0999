"""A lifecycle in words: replaced, left alone, and with parts missing."""

from __future__ import annotations

from iq_export.report.lifecycles import describe_lifecycle

RECORD = {
    "birth": 11, "death": 29, "channel": 507, "replaced": True, "reason": "", "tokens": 85,
    "at_position_0": 0.94, "down_proj_peak": 3129.4, "down_proj_median": 0.058,
    "residual_peak": 25096.0, "threshold": 412.5, "templates": 3, "deviation": 0.0123,
    "common_tokens": [
        {"token": "", "first": 40, "later": 0},
        {"token": " the", "first": 4, "later": 1},
    ],
}  # fmt: skip


def test_replaced() -> None:
    assert describe_lifecycle(RECORD) == [
        "blocks 11 to 29, residual channel 507, 85 tokens seen, 94% of them at position 0",
        "replaced by 3 templates, mean relative deviation 1.23%, threshold 412.5",
        "down-projection input up to 3129 (median 0.058), residual up to 25096",
        "most often a special token (40 first, 0 later), ' the' (4 first, 1 later)",
    ]


def test_form_of_insertion() -> None:
    how = {"form": "kv", "loss": {}, "reason": "asked for"}
    lines = describe_lifecycle({**RECORD, "insertion": how})
    assert lines[2] == "inserted in the kv form: asked for"


def test_left_alone_says_why() -> None:
    lines = describe_lifecycle({**RECORD, "replaced": False, "reason": "rows vary by 19 %"})
    assert lines[1] == "left as it is: rows vary by 19 %"


def test_two_sites_and_held_out_text() -> None:
    held = {
        "tokens": 3072, "sinks": 9, "detected": 9, "both": 8, "agreement": 0.96,
        "order_windows": 2, "order_differs": 1,
    }  # fmt: skip
    sites = [{"block": 1, "threshold": 31.2}, {"block": 2, "threshold": 58.91}]
    order = {"windows": 10, "differs": 2}
    found = describe_lifecycle({**RECORD, "sites": sites, "position_0_forced": True,
                                "held_out": held, "order_of_appearance": order})  # fmt: skip
    assert found[0].startswith("blocks 1 and 2 to 29, ")
    assert found[1].endswith("thresholds 31.2 at block 1 and 58.91 at block 2")
    assert found[2] == (
        "on 3072 held-out tokens 8 of 9 sinks found, position 0 aside; 1 others taken for sinks; "
        "96% matched to the nearest template; order of appearance would differ in 3 of 12 windows"
    )


def test_parts_may_be_missing() -> None:
    assert describe_lifecycle({"birth": 1, "death": 9}) == ["blocks 1 to 9", "replaced"]
