"""Put a projector on the Hugging Face Hub, with a model card from its metadata and its results.

    python recognize.py ... --num_beams 1 5 > table.md
    python -m tools.upload --projector_model_path exp/model.safetensors --repo_id user/name \
        --results_path table.md --language en

Log in first: hf auth login. `--card_path card.md` writes the card, and uploads nothing. What is
uploaded is used by `--projector_model_path user/name`.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import whisper
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from transformers.hf_argparser import HfArg

from command import InputError, parse_arguments, run_command
from loading import find_projector, read_config
from model import Config
from scoring import format_table

CARD = """\
---
{metadata}
---

# {title}

A projector of Slim-ASR: it lets the LLM {llm} read
what the encoder of Whisper {encoder} makes of speech. Both are fetched from their own places.

## Use

```bash
python -m tools.transcribe --projector_model_path {repo_id}{moved} --wav talk.mp3
```

`recognize.py` and `train.py` take the same `--projector_model_path`.

## Settings

{settings}

## Results

{results}
"""


@dataclass
class Arguments:
    """The flags of tools/upload.py."""

    projector_model_path: str = HfArg(help="The model.safetensors that train.py wrote.")
    repo_id: str = HfArg(help="Where it goes on the Hub: user/name.")
    results_path: Path | None = HfArg(
        default=None, help="What recognize.py or tools/score.py printed: a Markdown table."
    )
    language: list[str] | None = HfArg(default=None, help="Codes of its languages, such as en.")
    license: str = HfArg(default="apache-2.0", help="The licence of the projector.")
    private: bool = HfArg(default=False, help="Whether a repository made for it is private.")
    card_path: Path | None = HfArg(
        default=None, help="Write the card to this file, and upload nothing."
    )

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo_id):
            raise InputError(f"--repo_id must be user/name, got {self.repo_id}")


def make_card(config: Config, args: Arguments) -> str:
    """The README.md of the projector's repository."""
    models = hub_models(config)
    data = ModelCardData(
        base_model=list(models.values()) or None,
        language=args.language,
        license=args.license,
        pipeline_tag="automatic-speech-recognition",
        tags=["slim-asr"],
    )
    moved = ""
    for name in ("llm_model_name_or_path", "whisper_model_name_or_path"):
        if name not in models:
            moved += f" --{name} {Path(getattr(config, name)).name}"
    settings = [{"setting": name, "value": str(x)} for name, x in asdict(config).items()]
    results = "None yet."
    if args.results_path:
        results = read_results(args.results_path)
    return CARD.format(
        metadata=data.to_yaml(),
        title=args.repo_id.split("/")[1],
        llm=Path(config.llm_model_name_or_path).name,
        encoder=Path(config.whisper_model_name_or_path).name.removesuffix(".pt"),
        repo_id=args.repo_id,
        moved=moved,
        settings=format_table(settings),
        results=results,
    )


def hub_models(config: Config) -> dict[str, str]:
    """Names on the Hub of the LLM and the encoder, by their flags; a folder or a file has none."""
    names = {}
    llm = config.llm_model_name_or_path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", llm) and not Path(llm).exists():
        names["llm_model_name_or_path"] = llm
    encoder = config.whisper_model_name_or_path
    if encoder in whisper.available_models():
        names["whisper_model_name_or_path"] = f"openai/whisper-{encoder}"
    return names


def read_results(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--results_path: cannot read {path}: {error}") from error
    if "| --- |" not in text:
        raise InputError(f"--results_path: no Markdown table in {path}: what recognize.py printed?")
    return text.strip()


def write_card(card: str, path: Path) -> None:
    try:
        path.write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--card_path: cannot write {path}: {error.strerror}") from error


def upload(projector: Path, card: str, args: Arguments) -> str:
    """The address of the commit with both files."""
    api = HfApi()
    files = [
        CommitOperationAdd("model.safetensors", projector),
        CommitOperationAdd("README.md", card.encode()),
    ]
    try:
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        return api.create_commit(args.repo_id, files, commit_message="Add a projector").commit_url
    except Exception as error:  # also those of the Hub's HTTP library, which changes
        reason = " ".join(str(error).split())
        raise InputError(
            f"the Hub did not take {args.repo_id}: {reason}; is the network there, and did you log "
            "in by hf auth login?"
        ) from error


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(Arguments, argv)
    projector = find_projector(args.projector_model_path)
    card = make_card(read_config(projector), args)
    if args.card_path:
        write_card(card, args.card_path)
        print(args.card_path)
    else:
        print(upload(Path(projector), card, args))


if __name__ == "__main__":
    run_command(main)
