"""Makes the files in the folder beside it with the programs that people train with. CI only reads them.

``python tests/foreign/make.py [ORIGIN...]`` makes a virtual environment for each origin, installs the versions below
with ``constraints.txt``, writes the files anew, and prints which files changed. It needs a package index, and Python
3.11. ``--here`` uses the packages of the interpreter that runs it. ``--list`` prints the origins and their versions.

``expected.json`` has the ``state_dict`` of some models: name, shape, and the sum of the elements.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import venv
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent / "files"
TOP: Final = Path(__file__).parents[2]
RUN: Final = Path("/tmp/run")
"""Where every program writes: some write the path into their files."""
LIMIT: Final = 400_000
"""Bytes of an origin's files."""
FORBIDDEN: Final = (b"/work", b"/root", b"/home", os.uname().nodename.encode())
"""What no file may have in it."""

PINS: Final[dict[str, str]] = {
    "accelerate": "accelerate==1.15.0",
    "dcp": "",
    "fabric": "lightning==2.6.6",
    "fastai": "fastai==2.8.12",
    "fvcore": "fvcore==0.1.5.post20221221",
    "hf_export": "transformers==5.24.0",
    "hf_trainer": "transformers==5.24.0 accelerate==1.15.0",
    "ignite": "pytorch-ignite==0.5.5",
    "keras": "keras==3.15.1",
    "lightning": "lightning==2.6.6",
    "mmengine": "mmengine-lite==0.10.7 packaging matplotlib rich torchvision==0.28.0 opencv-python-headless==5.0.0.93",
    "orbax": "orbax-checkpoint==0.12.8",
    "peft": "peft==0.21.2 transformers==5.24.0",
    "sb3": "stable-baselines3==2.9.2",
    "sentence_transformers": "sentence-transformers==6.2.0 accelerate==1.15.0 datasets==5.2.0",
    "skorch": "skorch==1.4.0",
    "speechbrain": "speechbrain==1.1.2",
    "timm": "timm==1.0.31 torchvision==0.28.0",
    "torch_save": "",
    "trl": "trl==1.16.0 peft==0.21.2 datasets==5.2.0",
    "ultralytics": "ultralytics==8.4.190 torchvision==0.28.0",
}
"""Origins, and what pip installs for each, beside torch, numpy and safetensors."""


def use(name: str) -> Any:
    """Import a module that has no types here."""
    return importlib.import_module(name)


def net() -> Any:
    """Return the model that most of them train; the tests make it too."""
    nn = use("torch").nn
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def trained(kind: str = "Adam") -> tuple[Any, Any]:
    """Return the model after one step of an optimizer, and the optimizer."""
    torch = use("torch")
    model = net()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def stub_torchvision() -> None:
    """Let torchvision be imported where its compiled part does not fit this build of torch; nothing here runs it."""
    torch = use("torch")
    operators = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in (*operators, *(f"_{operator}_backward" for operator in operators[2:])):
        with contextlib.suppress(RuntimeError):  # It fits.
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


# Trainers


def make_lightning(folder: Path) -> None:
    """Two callbacks with a metric each, and last.ckpt; a metric with a slash makes folders."""
    torch, pl = use("torch"), use("lightning.pytorch")

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch).square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            loss, acc = ((0.6, 0.2), (0.5, 0.9), (0.4, 0.7))[self.current_epoch]
            self.log_dict({"val_loss": loss, "val/acc": acc})

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    callback = use("lightning.pytorch.callbacks").ModelCheckpoint
    saving = [
        callback(RUN, "{epoch}-{step}", monitor="val_loss", save_top_k=2, save_last=True),
        callback(RUN / "acc", "{epoch}-{val/acc:.2f}", monitor="val/acc", mode="max", save_top_k=-1),
        callback(
            RUN / "own", "m-{epoch}-{val/acc:.2f}", monitor="val/acc", mode="max", auto_insert_metric_name=False,
            every_n_epochs=2,
        ),
    ]  # fmt: skip
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=3, callbacks=saving, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    loader = use("torch.utils.data").DataLoader(torch.randn(8, 4), batch_size=4)
    trainer.fit(Task(), loader, loader)


def make_fabric(folder: Path) -> None:
    """The names of LitGPT: a file for each interval, a folder for each step."""
    fabric = use("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*trained())
    state = {"model": model, "optimizer": optimizer, "iter_num": 40, "step_count": 20}
    fabric.save("iter-000040-ckpt.pth", state)
    for step in (10, 20):
        fabric.save(f"step-{step:08d}/lit_model.pth", {**state, "iter_num": 2 * step, "step_count": step})


def tiny_gpt() -> Any:
    """Return a language model with 100 numbers or so."""
    transformers = use("transformers")
    config = transformers.GPT2Config(
        vocab_size=8, n_positions=4, n_embd=2, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    config.pad_token_id = 0
    return transformers.GPT2LMHeadModel(config)


def make_hf_trainer(folder: Path) -> None:
    """Two checkpoints with an evaluation each, and the final model beside them."""
    torch, transformers = use("torch"), use("transformers")
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])} for _ in range(4)]
    args = transformers.TrainingArguments(
        "out", num_train_epochs=2, per_device_train_batch_size=2, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, save_total_limit=2,
    )  # fmt: skip
    trainer = transformers.Trainer(tiny_gpt(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    for path in Path("out").iterdir():
        shutil.move(path, RUN / path.name)
    Path("out").rmdir()


def make_hf_export(folder: Path) -> None:
    """The same model in one file, and in shards."""
    model = tiny_gpt()
    model.save_pretrained("whole")
    model.save_pretrained("sharded", max_shard_size=300)


def make_peft(folder: Path) -> None:
    """An adapter alone."""
    peft = use("peft")
    peft.get_peft_model(
        tiny_gpt(), peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True)
    ).save_pretrained("adapter")
    Path("adapter/README.md").unlink()  # Their text.


def make_accelerate(folder: Path) -> None:
    """Folders that are numbered by itself."""
    accelerate = use("accelerate")
    config = accelerate.utils.ProjectConfiguration(project_dir=".", automatic_checkpoint_naming=True, total_limit=2)
    accelerator = accelerate.Accelerator(cpu=True, project_config=config)
    accelerator.prepare(*trained())
    for _ in range(3):
        accelerator.save_state()


def make_sentence_transformers(folder: Path) -> None:
    """What its trainer writes: the modules in numbered folders, and the state of the HF Trainer."""
    st, transformers, tokenizers = use("sentence_transformers"), use("transformers"), use("tokenizers")
    modules = use("sentence_transformers.sentence_transformer.modules")
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "one", "two"]
    model = tokenizers.models.WordLevel({text: number for number, text in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 2) | dict.fromkeys(
        ("num_hidden_layers", "num_attention_heads"), 1
    )
    config = transformers.BertConfig(vocab_size=6, max_position_embeddings=8, **sizes)
    transformers.BertModel(config).save_pretrained("base")
    fast.save_pretrained("base")
    sentence = st.SentenceTransformer(modules=[modules.Transformer("base"), modules.Pooling(2)], device="cpu")
    data = use("datasets").Dataset.from_dict({"a": ["one"] * 4, "b": ["two"] * 4, "score": [0.5] * 4})
    args = st.SentenceTransformerTrainingArguments(
        "out", num_train_epochs=1, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    loss = use("sentence_transformers.sentence_transformer.losses").CosineSimilarityLoss(sentence)
    st.SentenceTransformerTrainer(sentence, args, train_dataset=data, loss=loss).train()
    shutil.move("out/checkpoint-2", "checkpoint-2")
    shutil.rmtree("base")
    shutil.rmtree("out")
    Path("checkpoint-2/README.md").unlink()  # Their text.


def make_trl(folder: Path) -> None:
    """Supervised fine-tuning of an adapter."""
    trl, peft, datasets, transformers = use("trl"), use("peft"), use("datasets"), use("transformers")
    tokenizers = use("tokenizers")
    vocabulary = ["[PAD]", "a", "b", "c"]
    model = tokenizers.models.WordLevel({text: number for number, text in enumerate(vocabulary)}, unk_token="a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[PAD]")
    args = trl.SFTConfig(
        "out", max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=1, max_length=4,
    )  # fmt: skip
    trl.SFTTrainer(
        tiny_gpt(), args, train_dataset=datasets.Dataset.from_dict({"text": ["a b c"] * 4}), processing_class=fast,
        peft_config=peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True),
    ).train()  # fmt: skip
    for path in Path("out").glob("checkpoint-*"):
        (path / "README.md").unlink(missing_ok=True)
        shutil.move(path, RUN / path.name)
    shutil.rmtree("out")


def make_ignite(folder: Path) -> None:
    """Its own names: by iterations, by a score, and both."""
    torch, handlers, engine = use("torch"), use("ignite.handlers"), use("ignite.engine")
    model, optimizer = trained()
    trainer = engine.Engine(lambda engine, batch: None)
    scores = iter((0.25, 0.75, 0.5))
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    disk = handlers.DiskSaver(".", create_dir=False, require_empty=False)
    kinds = [
        handlers.Checkpoint(parts, disk, n_saved=2),
        handlers.Checkpoint(
            {"model": model}, disk, "best", lambda _: trainer.state.acc, score_name="acc", n_saved=2,
            global_step_transform=lambda *_: trainer.state.epoch,
        ),
        handlers.Checkpoint({"weights": model}, disk, score_function=lambda _: -trainer.state.acc, n_saved=1),
    ]  # fmt: skip

    def finish(engine: Any) -> None:
        engine.state.acc = next(scores)
        for kind in kinds:
            kind(engine)

    trainer.add_event_handler(use("ignite.engine").Events.EPOCH_COMPLETED, finish)
    trainer.run([torch.zeros(1)] * 4, max_epochs=3)


def make_skorch(folder: Path) -> dict[str, Any]:
    """Safetensors in ``params.pt``, with the optimizer and the criterion beside it; and files with their epoch."""
    np, torch, callbacks = use("numpy"), use("torch"), use("skorch.callbacks")
    inputs, labels = np.random.randn(16, 4).astype("float32"), np.array([0, 1] * 8)
    savers = [
        callbacks.Checkpoint(monitor=None, dirname="safe", use_safetensors=True, f_optimizer=None, f_criterion=None),
        callbacks.Checkpoint(monitor=None, dirname="state"),
        callbacks.Checkpoint(
            monitor=None, dirname="all", f_params="params_{last_epoch[epoch]}.pt", f_optimizer=None, f_criterion=None,
            f_history=None,
        ),
    ]  # fmt: skip
    named = [(f"saver{number}", saver) for number, saver in enumerate(savers)]
    classifier = use("skorch").NeuralNetClassifier(
        net(), criterion=torch.nn.CrossEntropyLoss, max_epochs=2, callbacks=named, verbose=0, train_split=None
    )
    classifier.fit(inputs, labels)
    return {"safe/params.pt": classifier.module_.state_dict()}


def make_fastai(folder: Path) -> None:
    """A file for each epoch, and the exported learner, which is a pickle of everything."""
    torch, learner, data = use("torch"), use("fastai.learner"), use("fastai.data.core")
    tracker = use("fastai.callback.tracker")
    loader = use("fastai.data.load").DataLoader([(torch.randn(4), torch.tensor(0)) for _ in range(8)], bs=4)
    learn = learner.Learner(
        data.DataLoaders(loader, loader), net(), loss_func=torch.nn.CrossEntropyLoss(), path=".", model_dir="models"
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01, cbs=tracker.SaveModelCallback(every_epoch=True, with_opt=True))
        learn.fit(1, 0.01, cbs=tracker.SaveModelCallback(monitor="valid_loss", fname="best"))


def make_timm(folder: Path) -> dict[str, Any]:
    """The command line's arguments and an average beside the model; the best ones, and what a recovery reads."""
    torch = use("torch")
    utils = use("timm.utils")
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    average = utils.ModelEmaV3(model, decay=0.5)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    average.update(model)
    args = argparse.Namespace(model="net", lr=0.1, when=datetime.timedelta(1))
    saver = utils.CheckpointSaver(model, optimizer, args, average, checkpoint_dir=".", recovery_dir=".", max_history=2)
    saver.save_checkpoint(1, metric=0.25)
    saver.save_checkpoint(2, metric=0.75)
    saver.save_checkpoint(3, metric=0.5)
    saver.save_recovery(4, 7)
    return {"last.pth.tar: state_dict": model.state_dict(), "last.pth.tar: state_dict_ema": average.module.state_dict()}


def make_mmengine(folder: Path) -> dict[str, Any]:
    """A checkpoint of each epoch with the message hub: history buffers and numpy scalars."""
    torch = use("torch")
    loader = use("torch.utils.data").DataLoader

    class Task(use("mmengine.model").BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, *inputs: Any, mode: str = "loss") -> Any:
            return {"loss": self.net(torch.stack(inputs)).square().mean()}

    model = Task()
    runner = use("mmengine.runner").Runner(
        model,
        work_dir=str(RUN),
        train_dataloader=loader([torch.randn(4) for _ in range(8)], batch_size=4, collate_fn=lambda x: x),
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2}},
        log_level="ERROR",
    )
    runner.train()
    for path in RUN.glob("2*"):  # Its configuration and its log.
        (shutil.rmtree if path.is_dir() else os.remove)(path)
    return {"epoch_3.pth": model.state_dict()}


def make_fvcore(folder: Path) -> None:
    """What detectron2 writes with: numbered files, ``model_final.pth``, and a text file with the newest name."""
    checkpoint = use("fvcore.common.checkpoint")
    model, optimizer = trained()
    saver = checkpoint.Checkpointer(model, ".", optimizer=optimizer)
    periodic = checkpoint.PeriodicCheckpointer(saver, period=2, max_iter=6, max_to_keep=2)
    for iteration in range(6):
        periodic.step(iteration)


def make_speechbrain(folder: Path) -> dict[str, Any]:
    """A folder per checkpoint: torch files and text files, all called ``.ckpt``."""
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # It is imported, and not used to save.
    sys.modules["torchaudio"].__version__ = "2.11.0"  # type: ignore[attr-defined]
    model, optimizer = trained()
    counter = use("speechbrain.utils.epoch_loop").EpochCounter(3)
    counter.current = 2
    parts = {"model": model, "optimizer": optimizer, "counter": counter}
    saver = use("speechbrain.utils.checkpoints").Checkpointer(".", recoverables=parts)
    saver.save_checkpoint(meta={"loss": 0.75}, name="one")
    saver.save_and_keep_only(meta={"loss": 0.5}, name="two", num_to_keep=1)
    return {"CKPT+two": model.state_dict()}


def make_sb3(folder: Path) -> None:
    """A zip file of torch files and JSON."""
    gym, np, sb3 = use("gymnasium"), use("numpy"), use("stable_baselines3")

    class Still(gym.Env):  # type: ignore[misc, name-defined]
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def reset(self, seed: Any = None, options: Any = None) -> Any:
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(2, np.float32), 1.0, True, False, {}

    shape = {"net_arch": [2]}
    agent = sb3.PPO("MlpPolicy", Still(), n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=shape, device="cpu")
    saver = use("stable_baselines3.common.callbacks").CheckpointCallback(8, ".")
    agent.learn(16, callback=saver)
    for path in Path().glob("*.zip"):
        with_machine = path.rename(f"{path.stem}.old")
        with zipfile.ZipFile(with_machine) as old, zipfile.ZipFile(path, "w") as new:
            for item in old.infolist():
                if item.filename != "system_info.txt":  # The kernel of this machine.
                    new.writestr(item, old.read(item))
        with_machine.unlink()


def make_ultralytics(folder: Path) -> dict[str, Any]:
    """A checkpoint in which the average is a whole pickled module, in half precision."""
    torch = use("torch")
    layers = [[-1, 1, "Conv", [4, 3, 2]], [-1, 1, "Conv", [4, 3, 2]], [-1, 1, "Conv", [4, 3, 2]]]
    config = {"nc": 1, "reg_max": 1, "backbone": layers, "head": [[[1, 2], 1, "Detect", ["nc"]]]}
    model = use("ultralytics.nn.tasks").DetectionModel(config, ch=3, verbose=False)
    model.args = types.SimpleNamespace(lr0=0.01, box=7.5)
    trainer = types.SimpleNamespace(
        epoch=3,
        best_fitness=0.5,
        fitness=0.5,
        ema=use("ultralytics.utils.torch_utils").ModelEMA(model),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        args=types.SimpleNamespace(lr0=0.01, save_dir="runs"),
        metrics={"fitness": 0.5},
        read_results_csv=dict,
        stopper=types.SimpleNamespace(best_fitness=0.5, best_epoch=3),
        wdir=folder,
        last=folder / "last.pt",
        best=folder / "best.pt",
        save_period=-1,
    )
    use("ultralytics.engine.trainer").BaseTrainer.save_model(trainer)
    (folder / "best.pt").unlink()
    return {"last.pt": trainer.ema.ema.half().state_dict()}


def make_keras(folder: Path) -> None:
    """A zip file with HDF5 in it, and HDF5 alone."""
    os.environ["KERAS_BACKEND"] = "torch"
    keras = use("keras")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.save("2.keras")
    model.save_weights("2.weights.h5")


def make_orbax(folder: Path) -> None:
    """A folder per step, for JAX."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    ocp, np = use("orbax.checkpoint"), use("numpy")
    with ocp.CheckpointManager(RUN, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in (1, 2, 3):
            manager.save(step, args=ocp.args.StandardSave({"w": np.zeros(2)}), metrics={"loss": 0.5})
            manager.wait_until_finished()


# torch itself


def make_dcp(folder: Path) -> None:
    """Folders of torch's distributed checkpoints, with the names of torchtitan."""
    dcp = use("torch.distributed.checkpoint")
    for step in (10, 20):
        model, optimizer = trained()
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=f"step-{step}")


def make_torch_save(folder: Path) -> None:
    """What people write by hand, with the names that they give."""
    torch, np = use("torch"), use("numpy")
    model, optimizer = trained()
    weights = model.state_dict()
    state = {"model": weights, "optimizer": optimizer.state_dict()}
    names: tuple[str, ...] = (
        "ckpt/ckpt_1000.pt",
        "model/model-10.pt",
        "dash/checkpoint-500.pt",
        "gan/G_1000.pth",
        "best/best_model.pt",
    )
    names += ("pairs/epoch=2_step=300_val=0.12.pt", "own/model_20_0.75.pt", "own/model_30_0.50.pt")
    for name in (*names, "tar/checkpoint.pth.tar", "layer/last_layer_only.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        torch.save({**state, "epoch": 7} if name.endswith(".tar") else weights, name)
    numbers = {"epoch": np.int64(1), "step": np.int32(20), "val_loss": np.float64(0.25)}
    torch.save({**state, **numbers}, "numpy.pt")
    torch.save(model, "module.pt")
    with contextlib.redirect_stderr(io.StringIO()):
        torch.jit.save(torch.jit.script(model.eval()), "script.pt")
    torch.save({**state, "step": 30}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("python2.pth").write_bytes(python2())


def python2() -> bytes:
    """Return the bytes that torch 0.4 wrote under Python 2: pickles of protocol 2 with byte strings, then the data."""
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001):
        pickle.dump(value, stream, 2)
    sizes = OrderedDict(short=2, int=4, long=4)
    pickle.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": dict(sizes)}, stream, 2)

    def text(value: str) -> bytes:  # A str of Python 2 is bytes: SHORT_BINSTRING.
        return b"U" + bytes([len(value)]) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("1234") + text("cpu") + b"K\x02Nt" + b"Q"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt"
        + b"R"
    )
    entries = text("epoch") + b"K\x05" + text("state_dict") + b"}" + text("w") + tensor + b"s"
    stream.write(b"\x80\x02}(" + entries + b"u.")
    pickle.dump(["1234"], stream, 2)
    stream.write(struct.pack("<q2f", 2, 1.0, 2.0))
    return stream.getvalue()


# Writing them anew


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make a folder that is not there yet, work in it, and remove it."""
    before = Path.cwd()
    folder.mkdir()
    try:
        os.chdir(folder)
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def write(name: str, *, dry: bool = False) -> None:
    """Write the files of an origin with the packages of this interpreter, and print which files changed."""
    os.environ |= {"YOLO_AUTOINSTALL": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    stub_torchvision()
    use("torch").manual_seed(0)
    use("numpy").random.seed(0)
    make: Callable[[Path], dict[str, Any] | None] = globals()[f"make_{name}"]
    folder = HERE / name
    with working_in(RUN):
        states = make(RUN) or {}
        (RUN / "end").touch()
        (RUN / "end").unlink()
        before, after = (
            {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
            for top in (folder, RUN)
        )
        check(name, after)
        for file in sorted({*before, *after}):
            if before.get(file) != after.get(file):
                what = "gone" if file not in after else "new" if file not in before else "changed"
                print(f"{name}: {what}: {file} ({len(after.get(file, b''))} bytes)")
        if dry:
            return
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(RUN, folder, symlinks=True)
    path = HERE / "expected.json"
    expected = {file: sums for file, sums in json.loads(path.read_text()).items() if not file.startswith(f"{name}/")}
    for file, state in states.items():
        sums = {key: [[*value.shape], float(value.double().sum())] for key, value in state.items()}
        expected[f"{name}/{file}"] = sums
    lines = [f"{json.dumps(file)}: {json.dumps(state)}" for file, state in sorted(expected.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(name: str, files: dict[str, bytes]) -> None:
    """Raise if the files are large, or have a path or name of this machine in them."""
    size = sum(map(len, files.values()))
    found = [f"{file}: {text!r}" for file, data in files.items() for text in FORBIDDEN if text in data]
    if size > LIMIT or found:
        raise SystemExit(f"{name}: {size} bytes, at most {LIMIT}; of this machine: {found or 'nothing'}")


def trace(name: str) -> None:
    """Write an origin's files under strace, and store what it did to its folder, in this order, in ``operations``."""
    with tempfile.NamedTemporaryFile() as log:
        kinds = "openat,rename,renameat,renameat2,unlink,unlinkat,link,linkat,symlink,symlinkat,fsync,fdatasync"
        watched = ["strace", "-f", "-qq", "-y", "-s", "300", "-e", f"trace={kinds}", "-o", log.name]
        subprocess.run([*watched, sys.executable, "-W", "ignore", __file__, "--here", "--dry", name], check=True)
        lines = Path(log.name).read_text(errors="replace").splitlines()
    done = list(takewhile("write end".__ne__, dict.fromkeys(filter(None, map(operation, lines)))))
    (HERE.parent / "operations" / f"{name}.txt").write_text("".join(f"{line}\n" for line in done))


def operation(line: str) -> str:
    """Return what a line of strace says of a file in the folder; empty if it changes nothing there."""
    call = re.match(r"\d+ +(\w+)\((.*)\) += (\d+)", line)
    if call is None or (call[1] == "openat" and not re.search("O_WRONLY|O_RDWR|O_CREAT", call[2])):
        return ""
    paths = re.findall(r'"([^"]*)"', call[2]) or re.findall(r"<([^>]*)>", call[2])
    at = re.findall(r"<([^>]*)>", call[2])
    full = [os.path.normpath(os.path.join(at[0] if at else RUN, path)) for path in paths]
    own = [
        re.sub(r"(^|/)(\.?tmp)\w{6,8}(?=$|\.)", r"\1\2", path[len(str(RUN)) + 1 :])
        for path in full
        if path.startswith(f"{RUN}/")
    ]
    verb = {"openat": "write", "renameat": "rename", "renameat2": "rename", "unlinkat": "unlink", "linkat": "link"}
    return f"{verb.get(call[1], call[1])} {' -> '.join(own)}" if own else ""


def install_and_write(name: str) -> None:
    """Make a virtual environment with the versions of an origin, and run this program in it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        wanted = ["torch==2.13.0", "numpy", "safetensors", *PINS[name].split()]
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(TOP / "constraints.txt"), *wanted], check=True)
        subprocess.run([python, __file__, "--here", name], check=True)


def main() -> None:
    """Make all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("origins", nargs="*", choices=[[], *PINS])
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--dry", action="store_true", help="only print what would change")
    parser.add_argument("--trace", action="store_true", help="with strace, and the packages of this interpreter")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    for name in given.origins or PINS:
        if given.list:
            print(name, PINS[name])
        elif given.trace:
            trace(name)
        elif given.here:
            write(name, dry=given.dry)
        else:
            install_and_write(name)


if __name__ == "__main__":
    main()
