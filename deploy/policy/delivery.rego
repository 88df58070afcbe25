# Into whose hands a credential is given: what cannot be recalled is good until its end, whatever happens meanwhile.
# `input.target.revocability` is told by the target's backend: "instant", "session" or "ttl"; and so is `enforced_by`: who
# refuses what is beyond the scope, "target" or "gateway".
package ringfence.delivery

# For so long at most does an agent hold what nobody can take back. What a gateway uses for it is never in its hands.
longest_unrecallable_s := 300

deny contains {"code": "not_recallable", "message": sprintf("nobody can take back a credential for %v before its end, so an agent holds one for %v s at most: ask for less, or for delivery to the gateway (--delivery gateway)", [target_id, longest_unrecallable_s])} if {
	not recallable
	not for_a_gateway
	not short
}

# What the target itself keeps to no scope could do more than the lease says: no agent ever has it.
deny contains {"code": "delivery_gateway_only", "message": sprintf("what %v takes is never handed out: ask for delivery to the gateway (--delivery gateway)", [target_id])} if {
	not enforced_by_the_target
	not for_a_gateway
}

enforced_by_the_target if input.target.enforced_by == "target"

recallable if input.target.revocability in {"instant", "session"}

for_a_gateway if input.request.delivery == "gateway"

# As long as it would live: what is asked for, or what the limits leave of it.
short if {
	is_number(input.request.ttl_s)
	min([input.request.ttl_s, data.ringfence.limits.max_ttl_s]) <= longest_unrecallable_s
}

target_id := object.get(input, ["target", "target_id"], "unknown")
