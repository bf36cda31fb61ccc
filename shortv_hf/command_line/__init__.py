"""What the commands share: their options, and how errors are said."""
