"""Options of `mola prepare`."""

from dataclasses import dataclass, field

from mola.options.fields import option


@dataclass
class PrepareOptions:
    """Options of `mola prepare`."""

    task: str = field(
        metadata={"help": "A packaged task (`sample` generates its questions), or the path of your own task YAML."}
    )
    output_dir: str = field(
        metadata={"help": "Folder that receives <split>.json and dataset.hf.", "aliases": ["--output"]}
    )
    data: str | None = option(
        None,
        "File, `save_to_disk` folder or Hub name; or several files as train=A,validation=B,test=C. A single file "
        "becomes the split `train`. Default: the task's own Hub dataset.",
    )
    num_samples: int | None = option(
        None,
        "Number of training samples to draw at random from a single source, without replacement and without equal "
        "texts; samples for validation and test are drawn as well. Default: keep the splits of the source.",
    )
    num_validation: int | None = option(
        None, "Number of validation samples to draw (with `num_samples` only; default 1000)."
    )
    num_test: int | None = option(None, "Number of test samples to draw (with `num_samples` only; default 1000).")
    seed: int = option(0, "Seed of the drawn samples and of the generated questions.")
    train_size: int | None = option(None, "Number of generated training questions (task `sample` only; default 640).")
    validation_size: int | None = option(
        None, "Number of generated validation questions (task `sample` only; default 40)."
    )
    test_size: int | None = option(None, "Number of generated test questions (task `sample` only; default 100).")
    kinds: int | None = option(
        None,
        "Number of kinds of questions, 1 to 12; the kinds after the fifth are harder (task `sample` only; default 5).",
    )
    overwrite_output_dir: bool = option(
        False, "Replace an output folder that an earlier `mola prepare` wrote.", "overwrite"
    )
