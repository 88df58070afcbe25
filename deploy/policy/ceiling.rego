# METADATA
# title: The combinations that a ceiling allows by itself
# description: |
#   Entry point: data.ringfence.ceiling.decision. The input holds a whole ceiling. It decides nothing: people who set a
#   ceiling see what it names, and policy reports it as a finding. Requests are denied by combinations.rego.
package ringfence.ceiling

default decision := {
	"allow": false,
	"deny": [{"code": "undecided", "message": "the input holds no ceiling"}],
	"approvals": [],
	"max_ttl_s": 0,
}

decision := {
	"allow": count(combinations) == 0,
	"deny": sort(combinations),
	"approvals": [],
	"max_ttl_s": 0,
} if {
	is_array(input.ceiling)
}

combinations contains {"code": "ceiling_combination", "message": message} if {
	some pair in data.ringfence.combinations.never_together
	first := allowed & pair.first
	second := allowed & pair.second
	count(first) > 0
	count(second) > 0
	message := sprintf("%v; it allows %v, and %v", [pair.why, concat(", ", sort(first)), concat(", ", sort(second))])
}

allowed := {verb |
	some permission in input.ceiling
	some verb in permission.verbs
}
