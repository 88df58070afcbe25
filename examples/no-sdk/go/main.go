// Request a credential over HTTP from Go, without an SDK: go-jose for the messages, net/http for HTTP.
//
//	go run . KEY_FILE TASK_ID TARGET VERB RESOURCE
//
// Reads RINGFENCE_DOOR (the gateway's URL), RINGFENCE_TRUST_DOMAIN and RINGFENCE_TRUST_ROOT. Verifies the reply by the
// trust bundle, and prints it without the credential itself.
package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

var algorithms = []jose.SignatureAlgorithm{jose.ES256, jose.EdDSA}

type object = map[string]any

// agent is a key, and what it last heard from the gateway.
type agent struct {
	id, thumbprint, nonce string
	key                   jose.JSONWebKey
	alg                   jose.SignatureAlgorithm
}

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

func thumbprint(key jose.JSONWebKey) string {
	return base64.RawURLEncoding.EncodeToString(must(key.Thumbprint(crypto.SHA256)))
}

func load(path string) *agent {
	var file struct {
		ID  string          `json:"id"`
		JWK jose.JSONWebKey `json:"jwk"`
	}
	check(json.Unmarshal(must(os.ReadFile(path)), &file))
	alg := jose.EdDSA
	if _, ok := file.JWK.Key.(*ecdsa.PrivateKey); ok {
		alg = jose.ES256
	}
	return &agent{id: file.ID, thumbprint: thumbprint(file.JWK), key: file.JWK, alg: alg}
}

func (a *agent) sign(claims object, headers map[jose.HeaderKey]any) string {
	options := &jose.SignerOptions{ExtraHeaders: headers}
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: a.alg, Key: a.key.Key}, options))
	return must(must(signer.Sign(must(json.Marshal(claims)))).CompactSerialize())
}

// call sends a request with a DPoP proof (RFC 9449), and once more with the nonce that the first answer brings.
func (a *agent) call(method, path, body string) (int, []byte) {
	door := setting("RINGFENCE_DOOR", "http://127.0.0.1:8707") + "/ringfence"
	for attempt := 0; ; attempt++ {
		plain, _, _ := strings.Cut(path, "?")
		claims := object{"jti": rand.Text(), "htm": method, "htu": door + plain, "iat": time.Now().Unix()}
		if a.nonce != "" {
			claims["nonce"] = a.nonce
		}
		proof := a.sign(claims, map[jose.HeaderKey]any{"typ": "dpop+jwt", "jwk": a.key.Public()})
		request := must(http.NewRequest(method, door+path, strings.NewReader(body)))
		request.Header.Set("DPoP", proof)
		request.Header.Set("Content-Type", "application/jose")
		answer := must(http.DefaultClient.Do(request))
		content := must(io.ReadAll(answer.Body))
		check(answer.Body.Close())
		if nonce := answer.Header.Get("DPoP-Nonce"); nonce != "" {
			a.nonce = nonce
		}
		if answer.StatusCode < 300 {
			return answer.StatusCode, content
		}
		if attempt > 0 || answer.StatusCode != http.StatusUnauthorized {
			log.Fatalf("%d: %s", answer.StatusCode, content)
		}
	}
}

// verified returns the claims of a message of this type that one of keys (by thumbprint) signed.
func verified(compact, kind string, keys map[string]jose.JSONWebKey) object {
	message := must(jose.ParseSigned(compact, algorithms))
	header := message.Signatures[0].Protected
	if header.ExtraHeaders["typ"] != "ringfence."+kind+"+jwt" {
		log.Fatalf("this is no %s", kind)
	}
	key, found := keys[header.KeyID]
	if !found {
		log.Fatalf("the %s is signed by another key", kind)
	}
	var claims object
	check(json.Unmarshal(must(message.Verify(key)), &claims))
	return claims
}

// serviceKeys returns the keys that services sign with now, by role, from a trust bundle that the pinned root signed.
func serviceKeys(bundle string) map[string]map[string]jose.JSONWebKey {
	header := must(jose.ParseSigned(bundle, algorithms)).Signatures[0].Protected
	if header.JSONWebKey == nil || thumbprint(*header.JSONWebKey) != os.Getenv("RINGFENCE_TRUST_ROOT") {
		log.Fatal("another root signed the trust bundle")
	}
	root := map[string]jose.JSONWebKey{header.KeyID: *header.JSONWebKey}
	var trust struct {
		Services []struct {
			Roles []string `json:"roles"`
			Keys  []struct {
				KID       string          `json:"kid"`
				JWK       json.RawMessage `json:"jwk"`
				NotBefore int64           `json:"not_before"`
				NotAfter  int64           `json:"not_after"`
			} `json:"keys"`
		} `json:"services"`
	}
	check(json.Unmarshal(must(json.Marshal(verified(bundle, "trust.bundle", root))), &trust))
	keys, now := map[string]map[string]jose.JSONWebKey{}, time.Now().Unix()
	for _, service := range trust.Services {
		for _, role := range service.Roles {
			for _, record := range service.Keys {
				var jwk jose.JSONWebKey
				if now < record.NotBefore || now >= record.NotAfter || json.Unmarshal(record.JWK, &jwk) != nil {
					continue
				}
				if keys[role] == nil {
					keys[role] = map[string]jose.JSONWebKey{}
				}
				keys[role][record.KID] = jwk
			}
		}
	}
	return keys
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 6 {
		log.Fatal("usage: request KEY_FILE TASK_ID TARGET VERB RESOURCE")
	}
	me, now := load(os.Args[1]), time.Now().Unix()
	replyKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	claims := object{
		"iss": me.id, "aud": setting("RINGFENCE_TRUST_DOMAIN", "ringfence.local"), "iat": now, "exp": now + 60,
		"jti": rand.Text(), "task_id": os.Args[2], "ttl_s": 300, "reason": "an example in Go",
		"scope":     []object{{"target": os.Args[3], "verbs": []string{os.Args[4]}, "resources": []string{os.Args[5]}}},
		"reply_key": jose.JSONWebKey{Key: replyKey.Public()},
	}
	headers := map[jose.HeaderKey]any{"typ": "ringfence.credential.request+jwt", "kid": me.thumbprint}
	request := me.sign(claims, headers)
	var posted struct{ ID string }
	_, content := me.call(http.MethodPost, "/v1/requests", request)
	check(json.Unmarshal(content, &posted))
	_, bundle := me.call(http.MethodGet, "/v1/trust", "")
	keys := serviceKeys(string(bytes.TrimSpace(bundle)))
	for count := 0; ; {
		status, sealed := me.call(http.MethodGet, fmt.Sprintf("/v1/requests/%s?wait=30s&after=%d", posted.ID, count), "")
		if status == http.StatusAccepted {
			continue // no reply yet
		}
		count++
		envelope := must(jose.ParseEncryptedCompact(string(sealed), []jose.KeyAlgorithm{jose.ECDH_ES}, []jose.ContentEncryption{jose.A256GCM}))
		var reply struct{ Decision, Refusal, Delivery, Lease string }
		check(json.Unmarshal(must(envelope.Decrypt(replyKey)), &reply))
		decision := verified(reply.Decision, "credential.decision", keys["policy"])
		if decision["request"] != request {
			log.Fatal("the decision is about another request")
		}
		var result object
		switch {
		case reply.Refusal != "":
			result = object{"outcome": "refused", "reasons": verified(reply.Refusal, "issuer.refusal", keys["issuer"])["reasons"]}
		case reply.Delivery != "":
			credential := verified(reply.Delivery, "credential.delivery", keys["issuer"])["credential"].(object)
			delete(credential, "value")
			result = object{"outcome": "allowed", "credential": credential}
		case reply.Lease != "":
			result = object{"outcome": "allowed", "lease": verified(reply.Lease, "lease", keys["issuer"])["lease_id"]}
		case decision["outcome"] == "denied":
			result = object{"outcome": "denied", "reasons": decision["reasons"]}
		default:
			log.Printf("%s: waiting", decision["outcome"])
			continue
		}
		fmt.Println(string(must(json.Marshal(result))))
		return
	}
}
