# What one agent must not hold together, whether it asks for it at once or piece by piece, at one target or at several.
# `input.held` are the leases of the agent that live now.
package ringfence.combinations

# Each pair: who may do one of the first must not be able to do one of the second, and why.
never_together := [
	{
		"first": {"read-code", "clone", "pull", "contents:read"},
		"second": {"run-ci", "write-ci", "dispatch", "workflows:write", "actions:run"},
		"why": "what reads code must not run CI: a comment in the code could tell it what to run, with CI's own secrets",
	},
	{
		"first": {"push", "commit", "contents:write", "git:write"},
		"second": {"review", "approve-change", "merge", "pulls:approve", "pulls:merge"},
		"why": "what writes a change must not be what approves it",
	},
]

# Both halves in one request.
deny contains {"code": "combination", "message": pair.why} if {
	some pair in never_together
	wants_one_of(pair.first)
	wants_one_of(pair.second)
}

# One half, while a lease that lives has the other: also of another task, at another target.
deny contains to_be_given_back(pair, lease) if {
	some pair in never_together
	wants_one_of(pair.first)
	some lease in input.held
	has_one_of(lease, pair.second)
}

deny contains to_be_given_back(pair, lease) if {
	some pair in never_together
	wants_one_of(pair.second)
	some lease in input.held
	has_one_of(lease, pair.first)
}

# An empty list says that nothing is held. Where there is no list, nobody knows.
deny contains {"code": "held_unknown", "message": "what the agent holds already is not known, so nothing can be added to it"} if {
	not held_known
}

to_be_given_back(pair, lease) := {
	"code": "combination",
	"message": sprintf("%v; give back lease %v first", [pair.why, object.get(lease, "lease_id", "unknown")]),
}

wants_one_of(verbs) if count(wanted & verbs) > 0

wanted := {verb |
	some permission in input.request.scope
	some verb in permission.verbs
}

has_one_of(lease, verbs) if {
	some permission in lease.scope
	some verb in permission.verbs
	verb in verbs
}

held_known if {
	is_array(input.held)
	every lease in input.held {
		is_array(lease.scope)
	}
}
