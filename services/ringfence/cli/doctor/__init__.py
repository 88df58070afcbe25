"""`ringfence doctor`: checks of a deployment."""
