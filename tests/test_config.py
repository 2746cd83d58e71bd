"""The options of search.py and augment.py: their defaults, which values are refused, and how they are saved."""

import json

import pytest

from command_line.errors import UserError, user_errors_in_one_line
from config import AugmentConfig, SearchConfig
from experiment.protocol_options import ProtocolOptions
from genotypes import DARTS_V2
from models.choices import PRIMITIVES, SEARCH_SPACES
from models.ops import OPS
from run.options import hyphenate


def test_search_defaults_are_the_papers():
    config = SearchConfig([])
    assert (config.epochs, config.batch_size, config.layers, config.init_channels, config.nodes) == (50, 64, 8, 16, 4)
    assert (config.w_lr, config.w_lr_min, config.w_momentum, config.w_weight_decay) == (0.025, 0.001, 0.9, 3e-4)
    assert (config.w_grad_clip, config.alpha_lr, config.alpha_weight_decay) == (5.0, 3e-4, 1e-3)
    assert (config.order, config.seed, config.amp, config.device) == ("second", 2, False, "auto")
    assert (config.eps_scale, config.early_stop, config.variant) == (0.01, False, None)
    assert config.primitives == PRIMITIVES


def test_augment_defaults_are_the_papers():
    config = AugmentConfig(["--genotype", "DARTS_V2"])
    assert (config.epochs, config.batch_size, config.layers, config.init_channels) == (600, 96, 20, 36)
    assert (config.lr, config.momentum, config.weight_decay, config.grad_clip) == (0.025, 0.9, 3e-4, 5.0)
    assert (config.aux_weight, config.cutout_length, config.drop_path_prob, config.seed) == (0.4, 16, 0.2, 2)


@pytest.mark.parametrize("config", [SearchConfig, AugmentConfig, ProtocolOptions])
def test_every_option_has_help_in_a_named_group(config):
    parser = config.build_parser()
    assert all(action.help for action in parser._actions)
    assert {"data", "run"} < {group.title for group in parser._action_groups if group._group_actions}


def test_options_are_accepted_with_underscores_and_values_are_left_alone():
    words = ["--batch_size", "32", "--w_lr=0.1", "--name", "my_run", "--dataset=cifar10", "--data_path=a_b"]
    config = SearchConfig(words)
    assert (config.batch_size, config.w_lr, config.name, config.data_path) == (32, 0.1, "my_run", "a_b")
    words = ["--layers 2 --primitives skip_connect,sep_conv_3x3", "--a_b", "--a_b=c_d", "-a_b", "a_b", "--"]
    assert list(map(hyphenate, words)) == [words[0], "--a-b", "--a-b=c_d", "-a_b", "a_b", "--"]


FOLDER = ["--dataset", "folder"]
AUGMENT = ["--genotype", "DARTS_V2"]


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        ([], "--genotype is required"),
        (["--dataset", "imagenot"], "cifar10"),
        (["--batch-size", "0"], "of at least 1"),
        (["--w-lr", "nan"], "above 0"),
        (["--w-momentum", "1"], "below 1"),
        (["--order", "third"], "second"),
        ([*FOLDER, "--image-size", "7"], "of at least 8"),
        (["--name", "../precious"], "without slashes"),
        (["--gpus", "0", "--device", "cpu"], "leave --device out"),
        (["--batch", "3"], "--batch"),
        (["--primitives", "none"], "at least one other than none"),
        (["--primitives", "skip_connect,conv_1x1"], "unknown operation 'conv_1x1'"),
        (["--early-stop", "--eigenvalue-images", "0"], "--eigenvalue-images"),
        (["--layers", "2"], "at least 3"),
        (["--auto-resume", "--overwrite"], "--auto-resume"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(words, mention, capsys):
    with pytest.raises(SystemExit) as stop, user_errors_in_one_line("the script"):
        (SearchConfig if words else AugmentConfig)(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert mention in error


@pytest.mark.parametrize(
    ("config", "words", "option"),
    [
        (SearchConfig, ["--image-size", "64"], "--image-size"),
        (SearchConfig, ["--data-path", "my_images"], "--data-path"),
        (SearchConfig, ["--order", "first", "--eps-scale", "0.1"], "--eps-scale"),
        (SearchConfig, ["--early-stop", "--epochs", "26", "--variant", "pc-darts"], "--early-stop"),
        (AugmentConfig, [*AUGMENT, "--mirror"], "--mirror"),
        (AugmentConfig, ["--evaluate", "run", "--epochs", "3"], "--epochs"),
        (ProtocolOptions, ["--final-seeds", "0", "--finals", "all"], "--finals"),
    ],
)
def test_an_option_without_effect_is_refused(config, words, option):
    with pytest.raises(UserError, match=f"^{option} has no effect"):
        config(words)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    assert SearchConfig(["--runs-path=~/x", *FOLDER, "--data-path=~/y"]).runs_path == "/users/me/x"
    for config in (SearchConfig, AugmentConfig, ProtocolOptions):
        names = {"data_path", "runs_path", "resume", "genotype", "evaluate", "init_checkpoint"}
        for name in names & set(config.default_values({})):
            option = f"--{name.replace('_', '-')}"
            assert config.parse([f"{option}=~/x y"]) == {name: "/users/me/x y"}


@pytest.mark.parametrize("space", SEARCH_SPACES)
def test_a_search_space_stands_for_its_operations_to_which_a_users_script_may_add(space, monkeypatch):
    assert SearchConfig(["--primitives", space]).primitives == SEARCH_SPACES[space]
    monkeypatch.setitem(OPS, "conv_1x1", OPS["sep_conv_3x3"])
    assert SearchConfig(["--primitives", f"{space},conv_1x1"]).primitives == [*SEARCH_SPACES[space], "conv_1x1"]


# Saved options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SearchConfig, []),
        (SearchConfig, ["--primitives", "s3", "--variant", "pc-darts,snas", "--pc-share", "2", "--amp", "--name=-x"]),
        (AugmentConfig, ["--genotype", str(DARTS_V2), "--stem", "imagenet", "--lr", "0.123456789012345678"]),
    ],
)
def test_saved_options_are_read_back_as_they_were(config, words):
    options = config(words)
    saved = json.loads(json.dumps(options.as_dict()))
    assert vars(config.restored(saved, "config.json")) == vars(options)


def test_an_option_that_a_saved_run_lacks_has_its_default():
    saved = {"genotype": "DARTS_V2", "stem": "imagenet", "layers": 3}
    restored = AugmentConfig.restored(saved, "config.json")
    assert (restored.layers, restored.lr, restored.execution) == (3, 0.1, "fused")
    saved = SearchConfig(["--variant", "gdas"]).as_dict()
    del saved["gdas_temperature"]
    assert SearchConfig.restored(saved, "config.json").gdas_temperature == 10.0


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"layers": True}, "--layers"),
        ({"amp": "yes"}, "--amp"),
        ({"primitives": ["none"]}, "--primitives"),
        ({"unknown": 3}, "--unknown"),
        ({"early_stop": True, "epochs": 2}, "--early-stop"),
    ],
)
def test_saved_options_pass_the_checks_of_the_command_line(changes, mention):
    with pytest.raises(UserError, match=rf"^config\.json: .*{mention}"):
        SearchConfig.restored(SearchConfig([]).as_dict() | changes, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, "\xff"])
def test_a_damaged_config_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        SearchConfig(["--resume", str(tmp_path)])


def test_resuming_takes_the_options_of_the_run_and_allows_few_others(tmp_path):
    saved = SearchConfig(["--order", "first", "--seed", "7", "--name", "other"])
    (tmp_path / "config.json").write_text(json.dumps(saved.as_dict()))
    resumed = SearchConfig(["--resume", str(tmp_path), "--epochs", "60"])
    assert resumed.as_dict() == saved.as_dict() | {"epochs": 60}
    assert resumed.folder().path == tmp_path
    with pytest.raises(UserError, match=r"is not a run of augment\.py"):
        AugmentConfig(["--resume", str(tmp_path)])
    for words in (["--seed", "2"], ["--overwrite"], ["--name", "x"], ["--runs-path", "y"], ["--auto-resume"]):
        with pytest.raises(UserError, match=f"{words[0]} is fixed by the run"):
            SearchConfig(["--resume", str(tmp_path), *words])
