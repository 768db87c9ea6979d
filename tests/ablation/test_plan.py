"""Plans: which runs there are, in which order, and what keeps them all from starting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_orz.ablation.plan import check, make_plan
from megatron_orz.ablation.sets import SETS
from megatron_orz.checks import check_models, read_data
from megatron_orz.config import Config, EvaluationConfig, to_json
from megatron_orz.recipe_file import read_recipe

DEMO = read_recipe(Path("examples/demo.py"))


def test_sets_share_the_baseline_and_run_it_once(tmp_path: Path) -> None:
    plan = make_plan(DEMO, sets=["gae-lambda", "kl"], seeds=[0, 4], output=tmp_path, options=[])
    names = [run.full_name for run in plan.runs]
    assert names == [
        "baseline-seed0",
        "gae-lambda-0.95-seed0",
        "baseline-seed4",
        "gae-lambda-0.95-seed4",
        "kl-loss-seed0",
        "kl-penalty-seed0",
        "kl-loss-seed4",
        "kl-penalty-seed4",
    ]
    assert [run.config.run_dir for run in plan.runs] == [tmp_path / name for name in names]
    assert plan.sets["kl"] == {"none": "baseline", "loss": "kl-loss", "penalty": "kl-penalty"}
    assert plan.score == "evaluation/held_out/avg@4"


def test_the_baseline_is_the_recipe_as_the_options_leave_it(tmp_path: Path) -> None:
    """With lambda 0.95 in the options, 1.0 is the variant that takes runs of its own; with 0.9, both are."""
    for value, first in (("0.95", {"0.95": "baseline", "1.0": "gae-lambda-1.0"}), ("0.9", None)):
        options = ["--ppo.gae-lambda", value]
        plan = make_plan(DEMO, sets=["gae-lambda"], seeds=[0], output=tmp_path, options=options)
        expected = first or {"baseline": "baseline", "1.0": "gae-lambda-1.0", "0.95": "gae-lambda-0.95"}
        assert list(plan.sets["gae-lambda"].items()) == list(expected.items())
        assert plan.of("baseline")[0].config.ppo.gae_lambda == float(value)
        assert plan.of("gae-lambda-1.0")[0].config.ppo.gae_lambda == 1.0


def test_a_recipe_keeps_its_own_reference(tmp_path: Path) -> None:
    plan = make_plan(DEMO, sets=["kl"], seeds=[0], output=tmp_path, options=["--kl.reference", "elsewhere"])
    assert {run.config.kl.reference for run in plan.runs} == {Path("elsewhere")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sets": []}, "--sets  names none, or one twice; choose among algorithms, gae-lambda"),
        ({"sets": ["kl", "kl"]}, "--sets kl kl names none, or one twice"),
        ({"seeds": []}, "--seeds  names none, or one twice"),
        ({"seeds": [1, 1]}, "--seeds 1 1 names none, or one twice"),
        ({"options": ["--evaluation.data"]}, "the recipe has no evaluation.data"),
        ({"options": ["--dry-run"]}, "--dry-run belongs to a single run; leave it out"),
        ({"options": ["--fresh"]}, "--fresh belongs to a single run; leave it out"),
        ({"options": ["--ppo.num-responses", "1"]}, "algorithms grpo cannot be made of this recipe; leave the set out"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, list[str]], sentence: str, tmp_path: Path) -> None:
    given = {"sets": list(SETS), "options": [], **changes}
    seeds = [int(seed) for seed in changes.get("seeds", [0])]
    with pytest.raises(ValueError, match="^" + sentence.replace("+", r"\+")):
        make_plan(DEMO, sets=given["sets"], seeds=seeds, output=tmp_path, options=given["options"])


def test_a_variant_that_the_recipe_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(Path("examples/orz_7b_grpo.py"))
    with pytest.raises(ValueError, match=r"gae-lambda 0\.95 cannot be made of this recipe"):
        make_plan(recipe, sets=["gae-lambda"], seeds=[0], output=tmp_path, options=[])
    assert "ppo.gae_lambda 0.95 needs the values of a critic" in " ".join(capsys.readouterr().err.split())


def test_a_file_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe none"):
        read_recipe(Path("none"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="is no recipe; set RECIPE in it"):
        read_recipe(tmp_path / "empty.py")


def test_models_data_and_layout_are_checked_before_the_first_run(home: Path, tmp_path: Path) -> None:
    recipe = read_recipe(home / "recipe.py")
    changed: dict[str, Config] = {
        "holds no config.json": replace(recipe, policy=replace(recipe.policy, path=home)),
        "nowhere.jsonl": replace(recipe, evaluation=EvaluationConfig(data=(home / "nowhere.jsonl",))),
    }
    check(make_plan(recipe, sets=["kl"], seeds=[0], output=tmp_path, options=[]), num_ranks=1)
    for sentence, wrong in changed.items():
        with pytest.raises((ValueError, OSError), match=sentence):
            check(make_plan(wrong, sets=["kl"], seeds=[0], output=tmp_path, options=[]), num_ranks=1)
    plan = make_plan(recipe, sets=["kl"], seeds=[0], output=tmp_path, options=["--parallel.tp", "2"])
    with pytest.raises(ValueError, match=r"baseline-seed0: world size 1 is not a multiple of tp\*pp\*cp"):
        check(plan, num_ranks=1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_another_recipe_is_refused_and_one_of_fewer_steps_goes_on(home: Path, tmp_path: Path) -> None:
    recipe = read_recipe(home / "recipe.py")
    plan = make_plan(recipe, sets=["kl"], seeds=[0], output=tmp_path, options=[])
    run = plan.of("kl-loss")[0]
    run.config.run_dir.mkdir(parents=True)
    fewer_steps = replace(run.config, ppo=replace(run.config.ppo, num_steps=1))
    (run.config.run_dir / "config.json").write_text(to_json(fewer_steps))
    check(plan, num_ranks=1)
    other = replace(run.config, kl=replace(run.config.kl, coefficient=0.5))
    (run.config.run_dir / "config.json").write_text(to_json(other))
    with pytest.raises(ValueError, match=r"kl-loss-seed0: .*of another recipe: kl\.coefficient is 0\.05, was 0\.5"):
        check(plan, num_ranks=1)
    (run.config.run_dir / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        check(plan, num_ranks=1)


def test_max_prompts_keeps_the_first_of_the_training_prompts(home: Path) -> None:
    recipe = read_recipe(home / "recipe.py")
    tokenizer = check_models(recipe)
    few = replace(recipe, data=replace(recipe.data, max_prompts=7))
    assert read_data(few, tokenizer)[0] == read_data(recipe, tokenizer)[0][:7]
    assert read_data(few, tokenizer)[1] == read_data(recipe, tokenizer)[1]
    with pytest.raises(ValueError, match=r"data\.max_prompts 0 is not at least 1; leave it out for all prompts"):
        replace(recipe.data, max_prompts=0)
