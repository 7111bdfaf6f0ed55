"""Settings: mistakes are answered with the way out, and every setting is explained."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from searche1.config import AT_MOST_ONE, CHOICES, MAY_BE_ZERO, Config, check_values, config_keys, describe, load_config
from searche1.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_without_a_file_everything_is_the_default():
    assert load_config() == Config()


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    path = write(tmp_path, "grpo: {steps: 7, lr: 3e-6}\n")
    config = load_config(path, ["grpo.steps=9", "run.out=runs/x"])
    assert (config.grpo.steps, config.grpo.lr, config.run.out) == (9, 3e-6, "runs/x")
    assert config.grpo.clip_eps == Config().grpo.clip_eps


def test_lists_and_braces_survive_an_override():
    config = load_config(overrides=["grpo.adam_betas=[0.8,0.95]", "prompt.user=<q> {question} </q>"])
    assert tuple(config.grpo.adam_betas) == (0.8, 0.95)
    assert config.prompt.user == "<q> {question} </q>"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("grpo.clip_esp=0.3", "grpo.clip_eps"),
        ("opsd.kl_clp=1", "opsd.kl_clip"),
        ("rolout.group_size=4", "rollout"),
        ("train.learning_chunk=4", "train.logits_chunk"),
    ],
)
def test_a_key_that_does_not_exist_is_answered_with_the_nearest(typo, meant):
    with pytest.raises(UserError, match=rf"'{typo.split('=')[0].split('.')[0]}.*Did you mean '{meant}'\?"):
        load_config(overrides=[typo])


def test_a_typo_in_a_file_is_answered_like_one_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match=r"Did you mean 'grpo\.clip_eps'\?.*searche1 config"):
        load_config(write(tmp_path, "grpo:\n  clip_esp: 0.3\n"))


@pytest.mark.parametrize("override", ["grpo.steps=many", "grpo.lr=fast", "parallel.sequence=2.5", "grpo.steps=1.5"])
def test_a_value_of_the_wrong_type_is_named_with_its_key(override):
    key, value = override.split("=")
    with pytest.raises(UserError, match=f"config key '{key}'.*{value}"):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("opsd.validate_every=0", "more than 0"),
        ("rollout.temperature=0", "more than 0"),
        ("pool.chunk_questions=0", "more than 0"),
        ("grpo.lr=-1", "more than 0"),
        ("grpo.lr=.nan", "more than 0"),
        ("grpo.kl_coef=-0.1", "0 or more"),
        ("grpo.kl_coef=.nan", "0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_key_and_what_is_needed(override, needed):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=rf"^{key} must be {needed}, got "):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("opsd.lr_decay=lineer", "constant or linear"),
        ("pairs.text=x", "full or policy"),
        ("train.recompute=some", "none, selective, full or auto"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(override, needed):
    key, value = override.split("=")
    with pytest.raises(UserError, match=rf"^{key} must be {needed}, got '{value}'"):
        load_config(overrides=[override])


@pytest.mark.parametrize("override", ["rollout.top_p=1.5", "engine.mem_fraction=2", "health.max_error_share=1.01"])
def test_a_share_is_at_most_one(override):
    with pytest.raises(UserError, match=rf"^{override.partition('=')[0]} must be at most 1, got "):
        load_config(overrides=[override])


@pytest.mark.parametrize("betas", ["[0.9,1.5]", "[1.0,0.9]", "[-0.1,0.9]"])
def test_averages_of_adam_forget(betas):
    with pytest.raises(UserError, match=r"^grpo\.adam_betas must be 0 or more and less than 1, got "):
        load_config(overrides=[f"grpo.adam_betas={betas}"])


@pytest.mark.parametrize("override", ["engine.urls=[http://h:80,h:81]", "retriever.url=http://h:99999"])
def test_an_address_is_checked_before_anything_starts(override):
    with pytest.raises(UserError, match=r"give (one|an address) such as http://"):
        load_config(overrides=[override])


def test_a_password_in_an_address_of_an_engine_is_refused_and_not_shown():
    with pytest.raises(UserError, match=r"engine\.urls, of gateway, .*engine\.token_file") as refused:
        load_config(overrides=["engine.urls=[http://me:secret@gateway:80]"])
    assert "secret" not in str(refused.value)


def test_a_value_out_of_range_in_a_file_is_refused_too(tmp_path):
    with pytest.raises(UserError, match=r"^opsd\.epochs must be more than 0, got 0"):
        load_config(write(tmp_path, "opsd: {epochs: 0}\n"))


def test_zero_is_taken_where_it_means_none():
    config = load_config(overrides=[f"{key}=0" for key in MAY_BE_ZERO])
    assert config.grpo.kl_coef == config.retriever.threads == 0


def test_the_defaults_are_in_range_and_every_rule_is_about_a_setting_that_exists():
    check_values(Config())
    assert set(CHOICES) | MAY_BE_ZERO | AT_MOST_ONE <= set(config_keys())


def test_a_value_in_place_of_a_section_is_refused():
    with pytest.raises(UserError, match=r"grpo=3: .*GRPOConfig"):
        load_config(overrides=["grpo=3"])


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"config file not found: configs/none\.yaml"):
        load_config("configs/none.yaml")


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "grpo:\n  steps: 3\n bad indent: [\n")
    with pytest.raises(UserError, match=r"(?s)config\.yaml is not valid YAML.*line 3"):
        load_config(path)


def test_an_override_that_does_not_parse_is_named():
    with pytest.raises(UserError, match=r"^grpo\.adam_betas=\[0\.9 is not valid YAML"):
        load_config(overrides=["grpo.adam_betas=[0.9"])


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "is a list"), ("just words\n", "'just words' not in")])
def test_a_file_without_sections_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n")) == Config()


def test_an_override_without_a_value_shows_what_one_looks_like():
    with pytest.raises(UserError, match=r"must be key=value, got 'grpo\.steps'; for example grpo\.steps=10"):
        load_config(overrides=["grpo.steps"])


def test_every_setting_is_described_with_its_value_and_a_comment():
    lines = describe(Config()).splitlines()
    assert len(lines) == len(config_keys())
    for line, key in zip(lines, config_keys(), strict=True):
        setting, _, comment = line.partition("  # ")
        assert setting.startswith(f"  {key}: ")
        assert len(comment) > 3, key


def test_a_star_marks_what_is_not_the_default():
    lines = describe(load_config(overrides=["grpo.steps=3", "model.path=some/model"])).splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("*")] == ["* model.path", "* grpo.steps"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_of_this_repository_loads_and_names_settings_that_exist(path):
    config = load_config(path)
    named = list(leaves(OmegaConf.to_container(OmegaConf.load(path))))
    assert named and set(named) <= set(config_keys())
    assert describe(config).count("\n* ") > 3


def test_the_quickstart_configs_are_among_them():
    assert {"quickstart.yaml", "quickstart-fast.yaml"} <= {path.name for path in CONFIGS.glob("*.yaml")}
