#!/bin/sh
# kcat 1.7: the audit trail to the end of a file, each line one event to the byte.
#   RINGFENCE_KAFKA=kafka.example.org:9092 deploy/siem/kcat.sh /var/log/ringfence/audit.json
# Lines of KCAT_CONFIG, a file of `name=value` (mode 0600), say how to log in:
#   security.protocol=SASL_SSL
#   ssl.ca.location=/etc/ringfence/kafka-ca.pem
#   sasl.mechanism=SCRAM-SHA-512
#   sasl.username=siem
#   sasl.password=...
# or, with a client certificate: security.protocol=SSL, ssl.certificate.location, ssl.key.location.
# It ends where no broker answers: let something start it again, as systemd does with Restart=always.
# What else it does when something fails is told in docs/siem.md.
set -eu

file=${1:?name the file that the events go to}
[ -z "${KCAT_CONFIG:-}" ] || set -- -F "$KCAT_CONFIG"
[ -n "${KCAT_CONFIG:-}" ] || set --

# -u: each event is in the file before the next one is taken.
# group.instance.id: one that was killed goes on where it was as soon as it is back, on the same machine.
exec kcat "$@" -b "${RINGFENCE_KAFKA:?name the brokers, host:port}" -q -u -f '%s\n' \
    -X isolation.level=read_committed -X auto.offset.reset=earliest -X auto.commit.interval.ms=1000 \
    -X session.timeout.ms=10000 -X group.instance.id="$(uname -n)" \
    -G ringfence.siem.kcat ringfence.audit.v1 >>"$file"
