from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Failed

from lilpipe.errors import StageFailure
from tasks import stage


@pytest.mark.parametrize(
    ("state", "retried"),
    [(Failed(data=StageFailure("killed by SIGKILL")), True), (Failed(message="sft.num_epochs: got 0"), False)],
)
def test_a_failure_that_was_raised_may_pass_and_one_that_was_returned_may_not(state: State, retried):
    assert stage.is_retryable(None, cast(Any, None), state) is retried


def test_what_prefect_will_not_show_costs_no_stage():
    warnings: list = []
    page = object.__new__(stage.StagePage)
    page.logger = cast(Any, SimpleNamespace(warning=lambda *words: warnings.append(words)))

    def refuse():
        raise ConnectionError("no server")

    assert page._show(refuse) is None
    assert "no server" in str(warnings)


def test_keys_of_artifacts_are_what_prefect_allows():
    assert stage._key("rejection_sampling") == "rejection-sampling"
    assert stage._key("SFT.2") == "sft-2"
