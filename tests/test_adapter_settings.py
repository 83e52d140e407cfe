"""The adapter section of a config: options go with their method."""

from __future__ import annotations

import pytest

from studio.config import MethodConfig
from studio.errors import ConfigError
from trainers.adapter_settings import adapter_settings, rank_schedule


def test_an_overrides_method_has_options_of_its_own() -> None:
    section = MethodConfig(
        options={"init": "pissa"},
        overrides={
            "*.to_q": {"method": "dora"},  # type: ignore[dict-item]
            "*.to_k": {"rank": 2},  # type: ignore[dict-item]
            "*.to_v": {"method": "adalora", "options": {"patience": 1}},  # type: ignore[dict-item]
        },
    )
    settings, overrides = adapter_settings(section, steps=70)
    assert settings.options == {"init": "pissa"}
    assert overrides["*.to_q"] == {"method": "dora", "options": {}}
    assert overrides["*.to_k"] == {"rank": 2}, "another override's options stay what they are"
    assert overrides["*.to_v"]["options"] == {"total_steps": 70, "patience": 1}


def test_a_misspelt_method_or_option_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="'dorra'.*dora"):
        adapter_settings(MethodConfig(method="dorra"), 10)
    with pytest.raises(ConfigError, match="no option 'inti'.*init"):
        adapter_settings(MethodConfig(options={"inti": "pissa"}), 10)
    with pytest.raises(ConfigError, match="no option 'init'"):
        adapter_settings(MethodConfig(overrides={"*": {"method": "ia3", "options": {"init": "x"}}}), 10)  # type: ignore[dict-item]


def test_a_rank_schedule_starts_with_the_rank() -> None:
    assert rank_schedule(MethodConfig(), 0) is None
    schedule = rank_schedule(MethodConfig(rank=4, rank_schedule={10: 8}), 0)
    assert schedule is not None
    assert [schedule.rank_at(step) for step in (0, 9, 10, 99)] == [4, 4, 8, 8]
