"""One module for each page: from what the services say to what the page shows."""
