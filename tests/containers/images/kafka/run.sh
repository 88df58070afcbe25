#!/bin/sh
# KAFKA_LOG_DIRS=... becomes log.dirs=... as in the official image: `_` is a dot, `__` an underscore, `___` a hyphen.
set -euf # no globs: Java reads the class path
env | sed -nE 's/^KAFKA_([A-Z0-9_]+)=(.*)$/\1 \2/p' | while read -r name value; do
    name=$(printf %s "$name" | tr '[:upper:]' '[:lower:]' | sed 's/___/-/g; s/__/@/g; s/_/./g; s/@/_/g')
    echo "$name=$value"
done >/opt/kafka/config/server.properties
java="java -Xmx512m -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp /opt/kafka/libs/*"
$java kafka.tools.StorageTool format --ignore-formatted -t "${CLUSTER_ID:-5L6g3nShT-eMCtK--X86sw}" -c /opt/kafka/config/server.properties
exec $java kafka.Kafka /opt/kafka/config/server.properties
