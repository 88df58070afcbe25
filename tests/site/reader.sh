# What stands in the place of a reader on some pages of stories.py: who waits, opens a browser, or starts a second program.
# Sourced in the folder of the reader.

# served ADDRESS COMMAND...: a service in the background, ended with this shell; returns once it is ready
served() {
    local ready=$1; shift
    RINGFENCE_HTTP=$ready "$@" & local served=$!
    until curl -sf -o /dev/null "http://$ready/readyz"; do sleep 0.2; kill -0 $served || return; done
}
# watched COMMAND...: run what goes on until Ctrl-C, until it has printed a request
watched() {
    "$@" > watched.txt & local watching=$!
    until grep -q 'approvals approve' watched.txt; do sleep 0.2; kill -0 $watching || return; done
    kill $watching
}
# socket TASK: a gateway opens the socket of a task a moment after it has read the task's first lease
socket() { until [ -S ".ringfence/tasks/$1.sock" ]; do sleep 0.1; done; }
# credential: deploy-bot has got a credential, which policy and audit have seen
credential() {
    local bot=.ringfence/agents/deploy-bot.json ali=.ringfence/users/ali.json task
    task=$(ringfence --json task list | jq -r '.[] | select(.state.agent_id == "deploy-bot") | .id') &&
    ringfence --identity $bot request --task "$task" --allow 'platform:read:env/staging/web' --reason look > token.txt || return
    until ringfence --json --identity $ali inventory | jq -e 'any(.agents[]; .leases > 0)' > seen.txt; do sleep 0.2; done
    until ringfence --json --identity $ali audit coverage | jq -e '.leases_traced.whole > 0' > seen.txt; do sleep 0.2; done
}
# reported ADDRESS: planner reads at the target hub, a file server at this address, and tries what is blocked
reported() {
    local olga=.ringfence/users/olga.json ali=.ringfence/users/ali.json task path
    mkdir -p hub/notes && echo "buy milk" > hub/notes/today
    python3 -m http.server "${1##*:}" --bind 127.0.0.1 --directory hub > server.log 2>&1 &
    ringfence --identity $olga target add hub --description "the hub" --backend jwt --setting "url=http://$1" \
        --verb read --verb write --request 'GET /{path*} read {path*}' --request 'PUT /{path*} write {path*}' &&
    ringfence --identity $olga user set maria --add 'hub:read,write:notes/*' &&
    ringfence key new planner.json --id agent/planner &&
    ringfence agent register planner --description "plans" --key-file planner.json --allow 'hub:read:notes/*' &&
    task=$(ringfence --json --identity .ringfence/users/maria.json task assign planner --purpose "plan" \
        --allow 'hub:read:notes/*' --for 30m | jq -r .task_id) &&
    ringfence --identity planner.json request --task "$task" --allow 'hub:read:notes/*' --reason look --delivery gateway || return
    socket "$task"
    for path in "GET hub/notes/today" "GET hub/notes/today" "GET hub/notes/today" "PUT hub/notes/today" "GET hub/plans/secret" \
        "DELETE hub/notes/today"; do
        curl -s -o answer.txt --unix-socket ".ringfence/tasks/$task.sock" -X "${path% *}" "http://gateway/${path#* }"
    done
    for path in 7 8; do
        ringfence gateway connect --task "$task" -- \
            curl -s -o answer.txt --data x -H "X-Ringfence-Label: injected" "http://api.example/v1/charges/$path"
    done
    until ringfence --json --identity $ali gateway stats | jq -e '.blocked.total == 5' > seen.txt; do sleep 0.2; done
}
# alike: two requests wait
alike() { until ringfence --json approvals list | jq -e '.[0].alike | length == 2'; do sleep 0.2; done; }
# action_waits: an action of another agent waits for sam: what docs/gateway.md sets up, with an agent that merges
action_waits() {
    local may=hub:merge:repos/shop/pulls/7/merge olga=.ringfence/users/olga.json task
    ringfence --identity $olga target add hub --description "the hub" --verb read --verb merge --ask merge \
        --setting url=https://hub.example \
        --request 'GET /{path*} read {path*}' --request 'PUT /{path*} merge {path*}' &&
    ringfence --identity $olga user set maria --add $may &&
    ringfence key new merger.json --id agent/merger &&
    ringfence agent register merger --description "merges" --key-file merger.json --allow $may &&
    task=$(ringfence --json --identity .ringfence/users/maria.json task assign merger --purpose "release 421" \
        --allow $may --for 30m | jq -r .task_id) &&
    ringfence --identity merger.json request --task "$task" --allow $may --reason merge --delivery gateway || return
    socket "$task"
    curl -s --unix-socket .ringfence/tasks/$task.sock -X PUT --json '{"commit_title": "Merge the release 421"}' http://gateway/hub/repos/shop/pulls/7/merge &
    until ringfence --json approvals list | jq -e 'any(.kind == "action")'; do sleep 1; done
}
# enrolled: what pia does in her browser with the invitation
enrolled() {
    local olga=.ringfence/users/olga.json
    python -m tests.site.given passkey pia "$(ringfence --identity $olga --json user invite pia | jq -r .invitation)"
}
# pia_is_asked: an agent of pia's wants what she has to approve; sets REQUEST
pia_is_asked() {
    local may=platform:deploy:env/staging/web sam=.ringfence/users/sam.json task
    ringfence key new pia-bot.json --id agent/pia-bot &&
    ringfence --identity $sam agent register pia-bot --description "of pia" --key-file pia-bot.json --allow $may &&
    ringfence --identity .ringfence/users/olga.json agent transfer pia-bot --to pia &&
    task=$(ringfence --json --identity .ringfence/users/maria.json task assign pia-bot --purpose "try it" --allow $may \
        --for 30m | jq -r .task_id) || return
    ringfence --identity pia-bot.json request --task "$task" --allow $may --reason "roll out" --timeout 5m > token.txt &
    until REQUEST=$(ringfence --json approvals list --passkey | jq -er '.[0].request_id'); do sleep 1; done
}
# touched COMMAND...: run it, and sign at the link that it shows
touched() {
    "$@" > asked.txt 2>&1 & local asking=$!
    until grep -q '^http.*#from=' asked.txt; do sleep 0.2; kill -0 $asking || { cat asked.txt >&2; return 1; }; done
    python -m tests.site.given touch pia "$(grep '^http.*#from=' asked.txt)" && wait $asking; local status=$?
    cat asked.txt; return $status
}
# another: an installation of its own, without services, on the same broker
another() {
    local kafka; kafka=$(sed -n 's/^kafka = "\(.*\)"/\1/p' "$RINGFENCE_CONFIG")
    mkdir another && cd another
    unset RINGFENCE_IDENTITY RINGFENCE_USER
    export RINGFENCE_CONFIG=/dev/null RINGFENCE_KAFKA=$kafka RINGFENCE_EMBEDDED_BROKER=true RINGFENCE_TOPIC_PREFIX=another
    export RINGFENCE_TRUST_DOMAIN=example.com
    ROOT=$(ringfence --json init --operator ada | tee init.json | jq -r .trust_root) && export RINGFENCE_TRUST_ROOT=$ROOT
    ringfence topics apply && ringfence init --publish
}
# page_served ADDRESS COMMAND...: the same for the sign page of https://sign.example.com
page_served() {
    local ready=$1; shift
    RINGFENCE_SIGN_PAGE_HTTP=$ready "$@" & local served=$!
    until curl -sf -o /dev/null -H 'Host: sign.example.com' "http://$ready/"; do sleep 0.2; kill -0 $served || return; done
}
