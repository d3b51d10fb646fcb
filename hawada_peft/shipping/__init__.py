"""From a slim model to a verified folder: card, report, passport, the Hub; from folder to folder."""
