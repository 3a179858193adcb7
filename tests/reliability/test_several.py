"""A command in two processes at once, as torchrun starts them."""

import json
import os
import socket

import pytest

from tests.reliability.processes import Command, Setting, Surroundings, make_data, train_words

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is over, and the words that began it."""
    folder = tmp_path_factory.mktemp("several")
    words = train_words(make_data(folder), folder / "run", steps=2)
    assert Command(folder, *words).wait() == 0
    return folder / "run", words


def started(folder, *words, restarts=0):
    """Exit codes and outputs of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    ranks = [
        Command(folder, *words, setting=Setting(change=Surroundings(place | {"RANK": n, "LOCAL_RANK": n})))
        for n in ("0", "1")
    ]
    return [rank.wait() for rank in ranks], [rank.output for rank in ranks]


@pytest.mark.parametrize(
    ("more", "restarts"),
    [(["--json"], 1), (["--resume", "--json"], 0), (["--resume", "--max-steps", 2], 0), (["--dry-run"], 0)],
    ids=["started anew", "finished", "long enough", "dry run"],
)
def test_where_nothing_is_left_to_do_all_end_well(finished, tmp_path, more, restarts):
    """One was killed when the run was over, say: started anew, the first finds nothing, and tells those who wait."""
    run, words = finished
    if "--resume" in more:
        words = ["train", "--resume", run, "--device", "cpu"]
        more = [word for word in more if word != "--resume"]
    elif "--dry-run" in more:
        words = [tmp_path / "other" if word == run else word for word in words]
    codes, outputs = started(tmp_path, *words, *more, restarts=restarts)
    assert codes == [0, 0], outputs
    assert not outputs[1] and outputs[0]
    if "--json" in more:
        assert json.loads(outputs[0][outputs[0].index("{") :])["status"] == "finished"
