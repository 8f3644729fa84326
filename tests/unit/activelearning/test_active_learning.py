"""The contract of every strategy, and what each of them means by worth annotating."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from lib.activelearning import strategies
from lib.activelearning.leases import Offer
from lib.activelearning.ranking import RANKINGS, choose, combined, disagreement, distance, uncertainty
from lib.activelearning.scoring import cache
from lib.activelearning.scoring.cache import CaseScores

MODEL, VERSION = "heart", 3
NAMES = ("random", "first", "uncertainty", "alignment", "diverse", "combined")


class Store:
    """A datastore with scores in its images' infos, listed in any order."""

    def __init__(self, labelled: list[str], unlabelled: list[str], infos: dict[str, dict] | None = None) -> None:
        self.labelled, self.unlabelled, self.infos = labelled, unlabelled, infos or {}

    def get_unlabeled_images(self, label_tag=None, labels=None):
        return list(self.unlabelled)

    def get_labeled_images(self, label_tag=None, labels=None):
        return list(self.labelled)

    def get_image_info(self, image_id):
        return self.infos.get(image_id, {})


def case(entropy: float = 0.5, alignment: float = 0.5, angle: float = 0.0) -> CaseScores:
    """Scores whose vector points into a direction of a plane (degrees)."""
    turn = np.deg2rad(angle)
    return CaseScores(entropy, alignment, np.array([np.cos(turn), np.sin(turn)], np.float32))


def made_up(count: int, seed: int = 0) -> dict[str, CaseScores]:
    rng = np.random.default_rng(seed)
    return {f"case{i:02}": case(rng.random(), rng.uniform(-1, 1), rng.uniform(0, 360)) for i in range(count)}


def store_of(scores: dict[str, CaseScores], labelled: int, version: int = VERSION) -> Store:
    infos = {name: cache.scored({}, MODEL, version, s) for name, s in scores.items()}
    names = sorted(scores)
    return Store(names[:labelled], names[labelled:], infos)


def all_strategies(served: int = VERSION):
    return strategies([MODEL, "abdomen"], lambda model: served)


@pytest.fixture(params=NAMES)
def strategy(request):
    return all_strategies()[request.param]


@pytest.mark.parametrize("scored", [True, False])
class TestContract:
    """What holds for every strategy, with and without scores."""

    def store(self, scored: bool, labelled: int = 5, count: int = 20) -> Store:
        store = store_of(made_up(count), labelled)
        return store if scored else Store(store.labelled, store.unlabelled)

    def test_never_a_labelled_image(self, strategy, scored):
        store = self.store(scored)
        picks = {strategy({"seed": seed}, store)["id"] for seed in range(50)}
        assert picks <= set(store.unlabelled)
        while store.unlabelled:  # label what is picked, to the end
            picked = strategy({}, store)["id"]
            assert picked not in store.labelled
            store.unlabelled.remove(picked)
            store.labelled.append(picked)
        assert len(store.labelled) == 20

    def test_none_where_none_is_left(self, strategy, scored):
        assert strategy({}, Store(["a", "b"], [])) is None
        assert strategy({}, Store([], [])) is None
        assert strategy({}, Offer(self.store(scored), set(self.store(scored).unlabelled))) is None

    def test_one_case_left(self, strategy, scored):
        store = self.store(scored, labelled=19)
        assert strategy({}, store)["id"] == "case19"

    @pytest.mark.parametrize("seed", [0, 1, 7, "7"])
    def test_same_seed_same_pick(self, strategy, scored, seed):
        store = self.store(scored)
        assert strategy({"seed": seed}, store) == strategy({"seed": seed}, store)

    def test_the_order_of_listing_does_not_matter(self, strategy, scored):
        store = self.store(scored)
        expected = [strategy({"seed": seed}, store) for seed in range(5)]
        for shuffle in range(5):
            random.Random(shuffle).shuffle(store.unlabelled)
            random.Random(-shuffle).shuffle(store.labelled)
            assert [strategy({"seed": seed}, store) for seed in range(5)] == expected

    def test_the_score_belongs_to_the_returned_image(self, strategy, scored):
        store = self.store(scored)
        found = strategy({"seed": 1}, store)
        if not scored or found["method"] not in RANKINGS:
            assert "score" not in found, "nothing was scored"
            return
        scores = {c: cache.scores_of(i, MODEL) for c, i in store.infos.items()}
        free = sorted(store.unlabelled)
        values = RANKINGS[found["method"]]([scores[c] for c in free], [scores[c] for c in store.labelled])
        assert found["score"] == pytest.approx(values[free.index(found["id"])], abs=1e-6)
        assert found["score"] == pytest.approx(max(values), abs=1e-6)

    def test_cases_of_others_are_left_out(self, strategy, scored):
        store = self.store(scored)
        taken = set(store.unlabelled[:10])
        assert {strategy({"seed": s}, Offer(store, taken))["id"] for s in range(30)} <= set(store.unlabelled) - taken


@pytest.mark.parametrize("seed", ["soon", [], {}, float("inf")])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "first"])
def test_a_seed_must_be_a_number(name, seed):
    with pytest.raises(ValueError, match="^seed: (expected a whole number|an empty list says nothing)"):
        all_strategies()[name]({"seed": seed}, Store([], ["a"]))


def test_the_names_that_clients_show_and_their_options():
    found = all_strategies()
    assert tuple(found) == NAMES
    assert found["first"].info()["config"] == {}
    assert found["random"].info()["config"] == {"seed": -1}
    assert found["uncertainty"].info()["config"] == {"model": [MODEL, "abdomen"], "seed": -1}
    assert next(iter(strategies([MODEL], lambda m: 1, "diverse"))) == "diverse"


def test_uncertainty_is_the_largest_entropy():
    cases = {"a": case(entropy=0.2), "b": case(entropy=0.9), "c": case(entropy=0.5)}
    assert choose(uncertainty, cases, [], 3) == [("b", 0.9), ("c", 0.5), ("a", 0.2)]


def test_alignment_is_the_lowest_cosine():
    cases = {"a": case(alignment=1.0), "b": case(alignment=-1.0), "c": case(alignment=0.0)}
    assert choose(disagreement, cases, [], 3) == [("b", 1.0), ("c", 0.5), ("a", 0.0)]


def test_diverse_is_the_farthest_from_all_that_is_known():
    cases = {"a": case(angle=10), "b": case(angle=100), "c": case(angle=180)}
    picked = choose(distance, cases, [case(angle=0)], 3)
    # Chords of the unit circle: 2 sin(angle / 2). After c (180°), b is 80° from it and a 10° from what was known.
    assert [name for name, _ in picked] == ["c", "b", "a"]
    expected = [2 * np.sin(np.deg2rad(d) / 2) for d in (180, 80, 10)]
    assert [value for _, value in picked] == pytest.approx(expected, abs=1e-6)


def test_diverse_begins_with_the_most_typical_case():
    cases = {"lone": case(angle=180), "left": case(angle=-10), "middle": case(angle=0), "right": case(angle=10)}
    assert choose(distance, cases, [])[0][0] == "middle"


def test_diverse_tells_look_alikes_apart_as_the_store_keeps_them():
    """As float16, where 2 - 2 cos of vectors this close is rounding."""
    towards, known = np.zeros(768), np.full(768, 768**-0.5)
    towards[::2], towards[1::2] = known[::2], -known[1::2]  # at a right angle to the known case
    vectors = {f"{d}": known * np.cos(d) + towards * np.sin(d) for d in (0.001, 0.002, 0.003)}
    kept = {name: CaseScores(0.5, 0.5, v.astype("<f2").astype(float)) for name, v in vectors.items()}
    picked = choose(distance, kept, [CaseScores(0.5, 0.5, known.astype("<f2").astype(float))])
    assert picked == [("0.003", pytest.approx(0.003, rel=0.2))]


def test_diverse_covers_groups_that_top_scores_would_miss():
    """Eight groups of five equal cases: eight picks by distance are one of each, eight by entropy are not."""
    groups = {f"g{g}n{n}": case(entropy=g / 8 + n / 100, angle=45 * g) for g in range(8) for n in range(5)}
    by_distance = {name[:2] for name, _ in choose(distance, groups, [groups["g0n0"]], 7)}
    assert by_distance == {f"g{g}" for g in range(1, 8)}
    assert len({name[:2] for name, _ in choose(uncertainty, groups, [], 8)}) == 2


def test_combined_is_the_mean_rank():
    cases = [case(0.9, 0.9, 0), case(0.5, 0.1, 90), case(0.1, 0.5, 180)]
    # Ranks from 0 to 1 by entropy 1, ½, 0; by disagreement 0, 1, ½; by distance from 0°: 0, ½, 1.
    assert combined(cases, [case(angle=0)]).tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])


def test_combined_ignores_what_tells_nothing_apart():
    """If the text has collapsed, every alignment is the same: the others decide."""
    cases = [case(0.9, 0.3, 10), case(0.5, 0.3, 90), case(0.1, 0.3, 180)]
    values = combined(cases, [case(angle=0)])
    expected = [np.mean([1, 0.5, 0]), np.mean([0.5, 0.5, 0.5]), np.mean([0, 0.5, 1])]
    assert values.tolist() == pytest.approx(expected)
    assert combined([case()], []).tolist() == [0.0]


def test_cases_that_others_work_on_count_as_covered():
    scores = {"known": case(angle=0), "taken": case(angle=180), "near taken": case(angle=170), "side": case(angle=90)}
    store = store_of(scores, 0)
    store.labelled, store.unlabelled = ["known"], ["near taken", "side", "taken"]
    diverse = all_strategies()["diverse"]
    assert diverse({}, store)["id"] == "taken"
    assert diverse({}, Offer(store, {"taken"}))["id"] == "side"


def test_without_scores_the_answer_says_so():
    store = Store([], ["a", "b"])
    found = all_strategies()["uncertainty"]({}, store)
    assert found["method"] == "random"
    assert found["note"] == ("uncertainty: version 3 of heart has scored none of the free cases yet; chosen at random")
    nothing = all_strategies(served=0)["diverse"]({}, store)
    assert "heart has no published version yet" in nothing["note"]


def test_partly_scored_pools_choose_among_the_scored():
    scores = {"a": case(entropy=0.2), "b": case(entropy=0.4)}
    store = store_of(scores, 0)
    store.unlabelled.append("new")
    found = all_strategies()["uncertainty"]({}, store)
    assert (found["id"], found["scored"], found["note"]) == ("b", 2, "2 of 3 free cases are scored")


def test_scores_of_different_versions_are_never_compared():
    """Version 4 has scored one case so far; version 3 knows three. Then version 4 draws level."""
    scores = {"a": case(entropy=0.1), "b": case(entropy=0.3), "c": case(entropy=0.2), "d": case(entropy=0.99)}
    store = store_of(scores, 0)
    store.infos["d"] = cache.scored({}, MODEL, 4, scores["d"])
    found = all_strategies(served=4)["uncertainty"]({}, store)
    assert (found["id"], found["version"]) == ("b", 3)
    assert found["note"] == (
        "these are scores of version 3 of heart; version 4 has scored fewer cases so far; 3 of 4 free cases are scored"
    )
    store.infos["a"] = cache.scored({}, MODEL, 4, scores["a"])
    found = all_strategies(served=4)["uncertainty"]({}, store)
    assert (found["id"], found["version"]) == ("d", 4)


def test_each_model_has_scores_of_its_own():
    store = store_of({"a": case(entropy=0.9), "b": case(entropy=0.1)}, 0)
    for name, entropy in (("a", 0.2), ("b", 0.8)):
        store.infos[name] = cache.scored(store.infos[name], "abdomen", 1, case(entropy=entropy))
    strategy = strategies([MODEL, "abdomen"], {MODEL: VERSION, "abdomen": 1}.__getitem__)["uncertainty"]
    assert strategy({}, store)["id"] == "a"
    assert strategy({"model": "abdomen"}, store)["id"] == "b"
    with pytest.raises(ValueError, match="unknown model 'liver'; valid are heart, abdomen"):
        strategy({"model": "liver"}, store)


SPOILT: list[Any] = ["x", 3, [], {MODEL: 3}, {MODEL: {}}, {MODEL: {"version": "x"}}, {MODEL: None}]


@pytest.mark.parametrize(
    "spoilt",
    [
        *({cache.KEY: x} for x in SPOILT),
        {cache.KEY: {MODEL: {"version": 3, "entropy": "high", "alignment": 0, "vector": ""}}},
        {cache.KEY: {MODEL: {"version": 3, "entropy": 0.9, "alignment": 0.1, "vector": ""}}},
        {cache.KEY: {MODEL: {"version": 3, "entropy": float("nan"), "alignment": 0.1, "vector": "AAA="}}},
        {cache.KEY: {MODEL: {"version": 3, "entropy": 0.9, "alignment": 0.1, "vector": "no base64!"}}},
        {cache.KEY: {MODEL: {"version": 3, "entropy": 0.9, "alignment": 0.1, "vector": "AHw="}}},  # infinity
        {cache.KEY: {MODEL: {"version": 3, "entropy": 0.9, "alignment": 0.1, "vector": "AAAAAAAA"}}},  # another width
        {cache.KEY: {MODEL: {"version": True, "entropy": 0.9, "alignment": 0.1, "vector": "AAA="}}},
        {cache.KEY: {MODEL: {"version": 3, "failed": "a file of text"}}},
    ],
)
@pytest.mark.parametrize("name", tuple(RANKINGS))
def test_infos_that_somebody_spoilt_are_no_scores(name, spoilt):
    store = store_of({"a": case(entropy=0.4), "b": case(entropy=0.5)}, 0)
    store.infos["spoilt"] = spoilt
    store.unlabelled.append("spoilt")
    found = all_strategies()[name]({}, store)
    assert found["id"] in ("a", "b") and found["scored"] == 2


def test_scores_survive_the_info():
    scores = case(0.25, -0.5, 30)
    info = cache.scored({"other": 1, cache.KEY: {"abdomen": {"version": 9}}}, MODEL, 7, scores)
    assert set(info[cache.KEY]) == {"abdomen", MODEL}
    back = cache.scores_of(info, MODEL)
    assert back is not None and (back.entropy, back.alignment) == (0.25, -0.5)
    assert np.allclose(back.vector, scores.vector, atol=1e-3)
    assert cache.version_of(info, MODEL) == 7
    assert cache.scores_of(cache.failed(info, MODEL, 8, "x"), MODEL) is None


def test_random_without_a_seed_prefers_cases_that_were_never_offered():
    store = Store([], ["a", "b", "c"], {"a": {"strategy": {"random": {"ts": 1}}}, "b": {"strategy": {"first": {}}}})
    assert {all_strategies()["random"]({}, store)["id"] for _ in range(20)} == {"c"}
    store.infos["c"] = {"strategy": {"random": {"ts": 2}}}
    assert {all_strategies()["random"]({}, store)["id"] for _ in range(100)} == {"a", "b", "c"}
