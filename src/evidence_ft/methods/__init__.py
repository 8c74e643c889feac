"""Fine-tuning methods: each file exports a frozen ``Config`` and ``prepare(encoder, class_names, config)``."""
