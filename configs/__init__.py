"""Recipes: flat YAML files, found by name when installed."""

if __name__ != "stepdistill.configs":
    raise ImportError("import stepdistill.configs, not configs")
