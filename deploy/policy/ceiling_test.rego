package ringfence.ceiling_test

import data.ringfence.ceiling

test_ceiling_without_a_combination if {
	ceiling.decision.allow with input as allowing([["web", ["clone", "pull", "push"]]])
}

test_empty_ceiling if ceiling.decision.allow with input as allowing([])

test_input_without_a_ceiling_is_undecided if {
	found := ceiling.decision with input as {}
	found.allow == false
	[one] := found.deny
	one.code == "undecided"
}

test_both_halves_at_one_target if {
	found := ceiling.decision with input as allowing([["web", ["clone", "run-ci", "read"]]])
	found.allow == false
	[one] := found.deny
	one.code == "ceiling_combination"
	endswith(one.message, "; it allows clone, and run-ci")
}

test_halves_at_two_targets if {
	found := ceiling.decision with input as allowing([["web", ["push", "commit"]], ["reviews", ["merge"]]])
	[one] := found.deny
	endswith(one.message, "; it allows commit, push, and merge")
}

test_halves_of_different_pairs if ceiling.decision.allow with input as allowing([["web", ["pull", "merge"]]])

test_every_pair_is_named if {
	found := ceiling.decision with input as allowing([["web", ["pull", "run-ci", "push", "merge"]]])
	count(found.deny) == 2
}

allowing(permissions) := {"ceiling": [{"target": target, "verbs": verbs, "resources": ["*"]} |
	some [target, verbs] in permissions
]}
