"""The Config: strict keys, overrides in YAML, one sentence an error."""

import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from trainer.config import RENAMED, Config, ScheduleConfig, from_tree, load
from trainer.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_resolved_tree_reads_back_equal(tmp_path: Path) -> None:
    config = load(None, ["run.epochs=3", "loss={name: cosface, margin: 0.2}", "scaling.workers=4"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "c.yaml") == config


def test_overrides_are_yaml_and_come_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {epochs: 7}\nloss: {name: cosface, scale: 30}\n")
    config = load(tmp_path / "c.yaml", ["loss.margin=0.1", "head.optimizer.lr=null", "augment.flip=true"])
    assert (config.run.epochs, config.loss.name, config.loss.margin, config.loss.scale) == (7, "cosface", 0.1, 30)
    assert config.augment.flip is True
    assert config.head.optimizer.lr is None


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["loss=cosface"], 1.0),
        (["loss=cosface", "head.optimizer.lr=0.5"], 0.5),
        (["loss=cosface", "head.rows=free"], 0.03),
        (["loss=cosface", "head.optimizer.name=adamw"], 0.03),
        (["loss=softmax"], 0.03),
        (["loss=triplet"], 0.03),
    ],
)
def test_the_heads_rate_where_none_is_given(overrides: list[str], rate: float) -> None:
    assert load(None, ["optimizer.lr=0.03", *overrides]).head_lr() == rate


@pytest.mark.parametrize(
    "address", ["s3://key:s3cret@bucket/run", "https://host/run", "s3://bucket/run?token=s3cret", "http://a:s3cret@b/c"]
)
def test_a_run_is_not_written_where_it_cannot_be_or_with_a_password(address: str) -> None:
    with pytest.raises(UserError, match=r"^config: run\.out: '[a-z0-9]+://[a-z/]+' cannot be written to, or") as caught:
        load(None, [f"run.out={address}"])
    assert "s3cret" not in str(caught.value)


def test_a_run_is_written_to_a_folder_or_an_address(tmp_path: Path) -> None:
    for given, read in (
        ("s3://bucket/run/", "s3://bucket/run"),
        ("abfs://container@account/run", "abfs://container@account/run"),
        (f"file://{tmp_path}", tmp_path),
        ("runs/one", Path("runs/one")),
    ):
        config = load(None, [f"run.out={given}"])
        assert config.run.out == read
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert load(tmp_path / "config.yaml") == config


def test_a_seed_has_at_most_63_bits() -> None:
    assert load(None, [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1
    with pytest.raises(
        UserError, match=r"run\.seed=9223372036854775808: input should be less than 9223372036854775808"
    ):
        load(None, [f"run.seed={2**63}"])
    above = {load(None, [f"run.seed={5 + part * 2**32}"]).run.torch_seed % 2**32 for part in range(100)}
    assert len(above) == 100


def test_a_loss_can_be_given_by_its_name_alone() -> None:
    assert load(None, ["loss=cosface"]).loss.name == "cosface"
    (loss,) = load(None, ["auxiliary=[cosface]", "auxiliary.0.weight=0.5"]).auxiliary
    assert (loss.name, loss.weight) == ("cosface", 0.5)


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().run.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.epoch=3", ["run.epoch", "epochs"]),
        ("run.epochs=x", ["run.epochs", "'x'", "integer"]),
        ("run.epochs=0", ["run.epochs", "0", "greater than or equal to 1"]),
        ("loss.margn=2", ["margn", "margin"]),
        ("loss.name=foo", ["foo", "arcface"]),
        ("data.batch_size=7", ["7", "multiple", "workers"]),
        ("nothing", ["nothing", "section.key=value"]),
        ("head.compute_dtype=fp16", ["head.compute_dtype", "fp16", "bf16"]),
        ("engine.zero_stage=3", ["engine.zero_stage", "3"]),
        ("auxiliary.0.weight=3", ["auxiliary"]),
        ("loss.margin=[", ["loss.margin=[", "YAML"]),
    ],
)
def test_what_is_not_allowed_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_answered_with_the_new_one(old: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [f"{old}=1"])
    assert str(caught.value) == f"config: '{old}' is called '{RENAMED[old]}' now; rename it"


def test_new_names_are_keys_and_old_ones_are_named_in_auxiliary_losses_too() -> None:
    tree = yaml.safe_load(load(None, ["loss=triplet"]).to_yaml())
    for new in RENAMED.values():
        node = tree
        for part in new.split("."):
            node = node[part]
    with pytest.raises(UserError, match=r"'auxiliary\.0\.selection' is called 'auxiliary\.0\.mining' now"):
        load(None, ["auxiliary=[{name: triplet, selection: all}]"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        load(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="list"):
        load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("run: {epochs: [}\n")
    with pytest.raises(UserError, match="not YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "python.yaml").write_text("run: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="not YAML"):
        load(tmp_path / "python.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    assert yaml.safe_load(load(path).to_yaml())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.margin=3.2", "config: loss.arcface.margin=3.2: input should be less than or equal to 3.14159"),
        ("loss.scale=1000000", "config: loss.arcface.scale=1000000: input should be less than or equal to 16384"),
        ("loss={name: cosface, scale: 1000000}", "config: loss.cosface.scale=1000000: input should be less than"),
        ("loss.weight=.inf", "config: loss.arcface.weight=inf: input should be a finite number"),
    ],
)
def test_a_constant_outside_its_range_is_one_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [override])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message)
    assert line.endswith("; choose a value within this bound")


def test_warm_up_is_linear_and_meets_the_peak() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=4)
    assert [config.learning_rate_factor(step, 20) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_halves_at_the_middle_and_ends_at_final() -> None:
    config = ScheduleConfig(kind="cosine", final=0.1)
    assert config.learning_rate_factor(50, 100) == pytest.approx(0.55)
    assert config.learning_rate_factor(100, 100) == pytest.approx(0.1)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2
    assert config.learning_rate_factor(25, 100) == pytest.approx(expected)


def test_polynomial_and_constant() -> None:
    config = ScheduleConfig(kind="polynomial", power=2)
    assert config.learning_rate_factor(50, 100) == pytest.approx(0.25)
    assert ScheduleConfig(kind="constant").learning_rate_factor(99, 100) == 1.0


def test_a_warm_up_longer_than_the_run_still_ends() -> None:
    assert ScheduleConfig(warmup_steps=100).learning_rate_factor(9, 10) == pytest.approx(10 / 11)


def test_margin_grows_to_its_value() -> None:
    config = ScheduleConfig(margin_warmup_steps=10)
    assert [config.margin_factor(step) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert ScheduleConfig().margin_factor(0) == 1.0


@pytest.mark.parametrize(
    ("workers", "batch", "sizes"), [(2, 12, (2,)), ([2, 4], 12, (2, 3, 4)), ([3, 8], 256, (4, 8)), ([4, 4], 8, (4,))]
)
def test_numbers_of_workers_that_share_the_batch(workers: object, batch: int, sizes: tuple[int, ...]) -> None:
    config = from_tree({"scaling": {"workers": workers}, "data": {"batch_size": batch}})
    assert config.world_sizes() == sizes
    assert from_tree(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("workers", [0, True, "x", 2.5, None, [2], [1, 2, 3], [4, 2], [0, 2], [1, 2.5]])
def test_what_is_no_number_of_workers(workers: object) -> None:
    with pytest.raises(UserError, match=r"is neither a number of workers, such as 8, nor \[least, most\]"):
        from_tree({"scaling": {"workers": workers}})


def test_a_batch_that_no_number_of_workers_can_share() -> None:
    with pytest.raises(UserError, match=r"not a multiple of any number in scaling\.workers \[5, 7\]; every worker"):
        from_tree({"scaling": {"workers": [5, 7]}, "data": {"batch_size": 256}})
