"""Few-step pipelines and schedulers for diffusers, and the export that writes them."""

if __name__ != "stepdistill.pipelines":
    raise ImportError("import stepdistill.pipelines, not pipelines")
