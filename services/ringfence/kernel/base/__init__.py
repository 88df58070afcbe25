"""Settings, metrics, log limits, the clock, errors, ids, text, retries and files.

Enters: `RINGFENCE_*` environment variables, the settings file, secret references, untrusted text and JSON.
Leaves: settings objects, secrets, derived ids, visible text, Prometheus metrics, the root of all errors.
Imports: `messages` only: it is the ground of the kernel. `runner.sandbox` and `scan` import no other part of
the kernel.
Read first:
- `settings.py`: where settings come from; the environment wins over the file.
- `errors.py`: `RingfenceError`, from which every error of Ringfence derives.
- `metrics.py`: every Prometheus metric, declared once.
"""
