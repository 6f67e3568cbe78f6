"""What --set says to a server is what it says in process."""

from __future__ import annotations

import pytest

from cluster.cli.options import request_overrides
from runtime.errors import ConfigError


def test_a_server_is_sent_what_the_config_made_of_the_text() -> None:
    settings = ["sampling.temperature=1e-1", "sampling.max_new_tokens=1e2", "sampling.stop_token_ids=3,4"]
    settings += ["lookahead={enabled: off, sources: [suffix]}"]
    assert request_overrides(None, settings) == {
        "sampling": {"temperature": 0.1, "max_new_tokens": 100, "stop_token_ids": [3, 4]},
        "lookahead": {"enabled": False, "sources": ["suffix"]},
    }


@pytest.mark.parametrize("setting", ["parallel.lp=2", "lookahead.row_budget=null", "sampling.stop_token_ids=[]"])
def test_what_cannot_be_asked_of_a_server_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="server"):
        request_overrides(None, [setting])
