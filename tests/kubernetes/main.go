// Authenticates one token as an API server of Kubernetes does: by its own code, and its own configuration file.
//
// Usage: kubernetes-authenticator CONFIGURATION < TOKEN. Prints the user as JSON, or why there is none. Who signed the
// issuer's certificate stands in the file that SSL_CERT_FILE names.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	"k8s.io/apiserver/plugin/pkg/authenticator/token/oidc"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: kubernetes-authenticator CONFIGURATION < TOKEN")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(configFile string) error {
	config, err := configuration(configFile)
	if err != nil {
		return err
	}
	token, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	authenticator, err := oidc.New(ctx, oidc.Options{
		JWTAuthenticator:     config.JWT[0],
		SupportedSigningAlgs: oidc.AllValidSigningAlgorithms(),
	})
	if err != nil {
		return err
	}
	for authenticator.HealthCheck() != nil {
		select {
		case <-ctx.Done():
			return authenticator.HealthCheck()
		case <-time.After(100 * time.Millisecond):
		}
	}
	response, ok, err := authenticator.AuthenticateToken(ctx, strings.TrimSpace(string(token)))
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("the token is of another issuer")
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"username": response.User.GetName(),
		"groups":   response.User.GetGroups(),
		"extra":    response.User.GetExtra(),
	})
}

func configuration(file string) (*apiserver.AuthenticationConfiguration, error) {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder()
	object, err := runtime.Decode(decoder, data)
	if err != nil {
		return nil, err
	}
	config, ok := object.(*apiserver.AuthenticationConfiguration)
	if !ok || len(config.JWT) != 1 {
		return nil, errors.New("not a configuration with one issuer")
	}
	return config, nil
}
