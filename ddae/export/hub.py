"""Push an exported folder to a hub of huggingface_hub, with the metadata that the hub shows."""

from pathlib import Path

from ddae.errors import UserError, one_line

NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")  # packages by which versions of the hub's connect
LIBRARIES = {"timm": "timm", "transformers": "transformers"}  # form of an export -> library_name of its card


def add_metadata(folder: Path, form: str) -> None:
    """Add library, tags and task to the model card, README.md, of an exported folder."""
    from huggingface_hub import ModelCard, ModelCardData

    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    card.data = ModelCardData(
        library_name=LIBRARIES.get(form, "ddae"),
        pipeline_tag="image-feature-extraction",
        tags=["masked-image-modeling", "self-supervised", "vision-transformer"],
    )
    card.save(folder / "README.md")


def describe(folder: Path, repo: str) -> str:
    """Return what push() would upload, as text."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = [f"{path.stat().st_size:12,} bytes  {path.name}" for path in files]
    return "\n".join([f"would be pushed to {repo}:", *lines])


def push(folder: Path, repo: str) -> str:
    """Create the repository unless it exists, and upload the folder in one commit. Return its URL.

    Raise UserError without a token, without a network, or if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Encoder exported by ddae")
    except HFValidationError as error:
        raise UserError(f"--push {repo} is no name of a repository ({one_line(error)}). Pass OWNER/NAME.") from None
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        problem = f"the hub at {api.endpoint} refuses ({one_line(error)})"
        raise UserError(f"--push {repo}: {problem}. Log in with hf auth login, or set HF_TOKEN.") from None
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in NETWORK:
            raise
        problem = f"the hub at {api.endpoint} cannot be reached ({one_line(error)})"
        raise UserError(f"--push {repo}: {problem}. {folder} is complete; push it later.") from None
    return str(url)
