"""What commands share: options, output, arguments."""
