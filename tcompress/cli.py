"""The command line: `tcompress demo`, `tcompress info`, `tcompress compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model (config.json and weights).")],
    out: Annotated[Path, typer.Argument(help="Folder for the compressed checkpoint.")],
    recipe: Annotated[str, typer.Option(help="A preset or a YAML file.")] = "int8",
    model_class: Annotated[str, typer.Option(help="Class of transformers to load it with.")] = "AutoModel",
    data: Annotated[Path | None, typer.Option(help="Text to calibrate on, a sample a line.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a sample; by default what the model takes.")] = None,
) -> None:
    """Compress a Hugging Face model and save it; `tcompress.load` reads it back."""
    import transformers

    import tcompress

    model = getattr(transformers, model_class).from_pretrained(source)
    tokenizer = texts = None
    if data is not None:
        texts = [line for line in data.read_text().splitlines() if line.strip()]
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    result = tcompress.compress(model, recipe, texts, tokenizer=tokenizer, max_length=max_length, inplace=True)
    result.report.print(Console())
    typer.echo(f"saved to {tcompress.save(result.model, out)}")
