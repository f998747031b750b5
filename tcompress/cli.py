"""The command line: `tcompress demo`, `info`, `compress`, `estimate`, `advise`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tcompress.errors import message

app = typer.Typer(help="Compress trained Transformers and run them on fused int8 kernels.", no_args_is_help=True)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="How long each input shape is timed.")] = 3.0,
) -> None:
    """Compress a pretrained sentence encoder to int8 and measure speed, accuracy and size.

    Exits with 1 where accuracy falls below its bound.
    """
    from tcompress.demo.runner import run

    failures = run(seconds=seconds).failures
    for failure in failures:
        typer.echo(f"FAILED: {failure}", err=True)
    raise typer.Exit(1 if failures else 0)


@app.command()
def info() -> None:
    """Show which kernels can run on this machine, and why others cannot."""
    import torch

    import tcompress
    from tcompress import _extension

    console = Console()
    console.print(f"tcompress {tcompress.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if _extension.C is None:
        console.print(_extension.WHY_NOT)
        return
    for path in reversed(_extension.C.all_paths()):
        state = _extension.C.why_not_usable(path) or "usable"
        chosen = " (chosen)" if path == _extension.C.current_path() else ""
        console.print(f"  {path}: {state}{chosen}", highlight=False)


_Source = Annotated[Path, typer.Argument(help="Folder of a Hugging Face model (config.json and weights).")]
_ModelClass = Annotated[str | None, typer.Option(help="Class of transformers to load it with; by default its own.")]
_Data = Annotated[Path | None, typer.Option(help="Text to calibrate on, a sample a line.")]
_MaxLength = Annotated[int | None, typer.Option(help="Tokens a sample; by default what the model takes.")]
_Recipe = Annotated[str, typer.Option(help="A preset or a YAML file.")]
_MaxMemory = Annotated[str | None, typer.Option(help='Most memory beside the model, such as "700 MB".')]


@app.command()
def compress(
    source: _Source,
    out: Annotated[Path, typer.Argument(help="Folder for the compressed checkpoint.")],
    recipe: _Recipe = "int8",
    model_class: _ModelClass = None,
    data: _Data = None,
    max_length: _MaxLength = None,
    max_memory: _MaxMemory = None,
    resume: Annotated[Path | None, typer.Option(help="Folder from which a run that was cut off goes on.")] = None,
) -> None:
    """Compress a Hugging Face model and save it; `tcompress.load` reads it back."""
    import tcompress

    with _explained():
        if out.exists() and (not out.is_dir() or out.resolve() == source.resolve()):
            kind = "the model's own folder" if out.is_dir() else "a file"
            raise ValueError(message("compress", "out", f"{out}, {kind}", "another folder"))
        steps = tcompress.Recipe.load(recipe)
        model, texts, tokenizer = _loaded(source, model_class, data)
        more: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "max_memory": max_memory}
        result = tcompress.compress(model, steps, texts, inplace=True, resume=resume, **more)
        result.report.print(Console())
        typer.echo(f"saved to {tcompress.save(result.model, out)}")


@app.command()
def estimate(
    source: _Source,
    recipe: _Recipe = "int8",
    model_class: _ModelClass = None,
    data: _Data = None,
    max_length: _MaxLength = None,
    max_memory: _MaxMemory = None,
) -> None:
    """Say how much memory and time `compress` with the same arguments will take."""
    import tcompress

    with _explained():
        steps = tcompress.Recipe.load(recipe)
        model, texts, tokenizer = _loaded(source, model_class, data)
        more: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "max_memory": max_memory}
        tcompress.estimate(model, steps, texts, inplace=True, **more).print(Console())


@app.command()
def advise(
    source: _Source,
    model_class: _ModelClass = None,
    data: _Data = None,
    max_length: _MaxLength = None,
    disk: Annotated[str | None, typer.Option(help='Largest file, such as "25 MB".')] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory of the weights.")] = None,
    latency: Annotated[str | None, typer.Option(help='Longest call on the first line of the data, "8 ms".')] = None,
    speedup: Annotated[float | None, typer.Option(help="At least so many times as fast as it is.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Most that the outputs' cosine may lose: 0.01.")] = None,
    recipe_out: Annotated[Path | None, typer.Option(help="File to write the best recipe to.")] = None,
) -> None:
    """Try recipes on a Hugging Face model and on this machine, and rank them.

    Exits with 1 where none keeps to the limits.
    """
    import tcompress
    from tcompress.advisor import Target

    limits = {"disk": disk, "memory": memory, "latency": latency, "speedup": speedup, "max_loss": max_loss}
    with _explained():
        target = Target.load({name: value for name, value in limits.items() if value is not None})
        model, texts, tokenizer = _loaded(source, model_class, data)
        advice = tcompress.advise(model, texts, target=target, tokenizer=tokenizer, max_length=max_length)
        advice.print(Console())
        if advice.recipe is not None and recipe_out is not None:
            recipe_out.write_text(advice.recipe.to_yaml())
    raise typer.Exit(0 if advice.recipe is not None else 1)


@contextmanager
def _explained() -> Iterator[None]:
    """What the user can mend is said in a line, and the exit status is 2; all else keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"tcompress: {error}", err=True)
        raise typer.Exit(2) from error


def _loaded(source: Path, model_class: str | None, data: Path | None) -> tuple[Any, list[str] | None, Any]:
    """A model, and the lines of a file of text with the model's tokenizer."""
    import transformers

    texts = None if data is None else [line for line in data.read_text().splitlines() if line.strip()]
    if model_class is None:  # AutoModel would leave out a head
        names = transformers.AutoConfig.from_pretrained(source).architectures or []
        model_class = next((name for name in names if hasattr(transformers, name)), "AutoModel")
    if not hasattr(transformers, model_class):
        raise ValueError(message("tcompress", "model-class", repr(model_class), "a class of transformers"))
    model = getattr(transformers, model_class).from_pretrained(source)
    return model, texts, None if texts is None else transformers.AutoTokenizer.from_pretrained(source)
