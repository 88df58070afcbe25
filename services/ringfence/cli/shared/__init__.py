"""Code that commands share: options, output, arguments."""
