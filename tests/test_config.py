import shlex

import pytest

from config import AugmentConfig, SearchConfig
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


def test_augment_defaults_are_the_papers():
    config = AugmentConfig(["--genotype", "DARTS_V2"])
    assert (config.epochs, config.batch_size, config.layers, config.init_channels) == (600, 96, 20, 36)
    assert (config.lr, config.momentum, config.weight_decay, config.grad_clip) == (0.025, 0.9, 3e-4, 5.0)
    assert (config.aux_weight, config.cutout_length, config.drop_path_prob, config.seed) == (0.4, 16, 0.2, 2)


def test_a_value_in_quotes_that_begins_as_an_option_is_left_alone():
    words = ["--layers 2 --primitives skip_connect,sep_conv_3x3", "--a_b", "--a_b=c_d", "-a_b", "a_b", "--"]
    assert list(map(hyphenate, words)) == [words[0], "--a-b", "--a-b=c_d", "-a_b", "a_b", "--"]


def test_options_are_accepted_with_underscores_and_values_are_left_alone():
    config = SearchConfig(["--batch_size", "32", "--w_lr=0.1", "--name", "my_run", "--data_path=a_b"])
    assert (config.batch_size, config.w_lr, config.name, config.data_path) == (32, 0.1, "my_run", "a_b")


def test_data_options_name_the_same_data():
    words = ["--dataset", "folder", "--data-path", "my images", "--image-size", "48", "--skip-bad-images"]
    config = SearchConfig(words)
    assert config.data_options() == "--dataset folder --data-path 'my images' --image-size 48 --skip-bad-images"
    assert SearchConfig([]).data_options() == "--dataset digits"
    again = AugmentConfig(["--genotype", "DARTS_V1", *shlex.split(config.data_options())])
    names = ("dataset", "data_path", "image_size", "image_channels", "skip_bad_images")
    assert all(getattr(again, name) == getattr(config, name) for name in names)


def test_every_option_has_help_and_stands_in_a_named_group():
    for config in (SearchConfig, AugmentConfig):
        parser = config.build_parser()
        for action in parser._actions:
            assert action.help
            assert not any("_" in option for option in action.option_strings)
        titles = [group.title for group in parser._action_groups if group._group_actions]
        assert {"network", "data", "run"} < set(titles)
        assert "positional arguments" not in titles


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (["--dataset", "imagenot"], "cifar10"),
        (["--batch-size", "0"], "of at least 1"),
        (["--init-channels", "0"], "of at least 1"),
        (["--epochs", "x"], "whole number"),
        (["--w-lr", "0"], "above 0"),
        (["--w-lr", "nan"], "above 0"),
        (["--w-lr", "inf"], "above 0"),
        (["--w-momentum", "1"], "below 1"),
        (["--order", "third"], "second"),
        (["--image-size", "7"], "of at least 8"),
        (["--image-channels", "2"], "3"),
        (["--workers", "-1"], "of at least 0"),
        (["--seed", "9" * 400], "whole number"),
        (["--name", "../precious"], "without slashes"),
        (["--name", "a\nb"], "characters"),
        (["--name", "x" * 241], "240 bytes"),
        (["--name", ".digits.replaced"], "being replaced"),
        (["--batch", "3"], "--batch"),
        (["--no-such-option"], "no-such-option"),
        (["--primitives", "none"], "at least one other than none"),
        (["--primitives", "skip_connect,skip_connect"], "different operations"),
        (["--primitives", "skip_connect,conv_1x1"], "unknown operation 'conv_1x1'"),
        (["--primitives", "s9"], "darts, s2, s3"),
        (["--primitives", ""], "unknown operation ''"),
        (["--primitives", "x" * 5000], "x'; give"),
        (["--execution", "slow"], "plain"),
        (["--cuda-graphs", "on"], "auto"),
        (["--eps-scale", "0"], "above 0"),
        (["--early-stop", "--eigenvalue-images", "0"], "--eigenvalue-images"),
        (["stray"], "stray"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(words, mention, capsys):
    with pytest.raises(SystemExit) as stop:
        SearchConfig(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert mention in error


def test_augment_requires_a_genotype(capsys):
    with pytest.raises(SystemExit):
        AugmentConfig([])
    assert "--genotype is required" in capsys.readouterr().err


@pytest.mark.parametrize("space", SEARCH_SPACES)
def test_a_named_search_space_is_stored_as_its_operations(space):
    names = SEARCH_SPACES[space]
    assert SearchConfig(["--primitives", space]).primitives.split(",") == list(names)
    assert SearchConfig(["--primitives", ",".join(names)]).primitives.split(",") == list(names)


def test_the_search_space_is_that_of_darts_unless_another_is_given():
    assert SearchConfig([]).primitives == ",".join(PRIMITIVES)
    assert SearchConfig(["--primitives", "s3,max_pool_3x3"]).primitives == "none,skip_connect,sep_conv_3x3,max_pool_3x3"


def test_an_operation_that_a_users_script_added_can_be_searched(monkeypatch):
    monkeypatch.setitem(OPS, "conv_1x1", OPS["sep_conv_3x3"])
    assert SearchConfig(["--primitives", "conv_1x1,none"]).primitives == "conv_1x1,none"


def test_saved_options_are_completed_by_the_defaults_of_their_stem():
    saved = {"genotype": "DARTS_V2", "stem": "imagenet", "layers": 2}
    restored = AugmentConfig.restored(saved, "config.json")
    assert (restored.layers, restored.lr, restored.execution) == (2, 0.1, "fused")


def test_reading_a_command_line_changes_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/augment/.digits.replaced").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    AugmentConfig(["--genotype", "DARTS_V2"])
    assert sorted(tmp_path.rglob("*")) == before


def test_defaults_are_those_of_an_empty_command_line():
    assert vars(SearchConfig.defaults()).items() == vars(SearchConfig([])).items()
    assert AugmentConfig.defaults().layers == 20


def test_as_markdown_is_a_table_of_every_option():
    config = SearchConfig(["--w-lr", "0.5"])
    lines = config.as_markdown().splitlines()
    assert lines[:2] == ["| option | value |", "|---|---|"]
    assert "| w-lr | 0.5 |" in lines
    assert len(lines) == 2 + len(config.as_dict())
