"""The recipe that a bundle was made by, read back from its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iq_export.bundle.manifest import MANIFEST_NAME, Manifest
from iq_export.errors import BundleError, UsageError

if TYPE_CHECKING:
    from iq_export.recipe import Recipe


def recipe_of(manifest: Manifest) -> Recipe | None:
    """The recipe with its settings; None of a bundle by an older version, which recorded its name.

    Raises BundleError if the settings are no recipe that this version knows.
    """
    if manifest.recipe_settings is None:
        return None
    from iq_export.recipe import Recipe

    try:
        return Recipe.from_record(manifest.recipe_settings)
    except (TypeError, UsageError) as error:
        raise BundleError(
            f"recipe_settings in {MANIFEST_NAME} are no recipe of this version ({error}): compile "
            "the bundle again, or use the version that wrote it"
        ) from error
