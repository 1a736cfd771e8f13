"""`ella-kd models`."""

import click
from huggingface_hub import constants

from ella_kd.models.files.hub import cached, size
from ella_kd.models.files.presets import PRESETS


@click.command()
def models() -> None:
    """List the models that --model and `ella-kd download` take: what is here, what is missing, sizes and licences.

    A file is *checked* if its sha256 is known from elsewhere than the hub, and compared.
    """
    for name, preset in PRESETS.items():
        here = {part: cached(file, part) is not None for part, file in preset.parts.items()}
        state = "here" if all(here.values()) else "missing" if not any(here.values()) else "in part"
        click.echo(f"{name:<18}{state:<9}{preset.what}")
        for part, file in preset.parts.items():
            notes = [size(file).strip(" ()"), file.licence or f"licence: see {constants.ENDPOINT}/{file.repo}",
                     "checked" if file.sha256 else "unverified"]
            click.echo(f"    {part.replace('_', '-'):<14}{'here' if here[part] else 'missing':<9}{file}")
            click.echo(f"    {'':<23}{', '.join(filter(None, notes))}")
    click.echo(f"\nThe cache: {constants.HF_HUB_CACHE}")
