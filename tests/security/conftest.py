"""What the tests of bundles as files share with those of their format."""

from tests.support.bundle_forger import folder, valid

__all__ = ["folder", "valid"]
