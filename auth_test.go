package main

// These tests cover who is calling, and for which tenant: keys, which requests are let in, keys that end, a database
// that leaves it in doubt, use without users, throttling, the log, and the wall between tenants. The last groups read
// the source and docs/SECURITY.md.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"go/types"
	"log/slog"
	"math/rand"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// ---- Helpers

// mustServerWithoutUsers starts the API on a database of its own that has no users_table.
func mustServerWithoutUsers(t testing.TB, args ...string) *testServer {
	t.Helper()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	return mustAPI(t, dsn, args...)
}

func (s *testServer) mustActivate(t testing.TB, email string) {
	t.Helper()
	mustRun(t, 0, s.dsn, "", "users", "activate", "-e", email)
}

func (s *testServer) mustDeactivate(t testing.TB, email string) {
	t.Helper()
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", email)
}

// keyID is the part of a key that may be shown.
func keyID(key string) string { return key[len("tdb_"):][:keyIDLength] }

// mustReplaceKey gives the user a new key on the command line and returns it.
func (s *testServer) mustReplaceKey(t testing.TB, email string, flags ...string) string {
	t.Helper()
	args := append([]string{"users", "regenerate-key", "-q", "-y", "-e", email}, flags...)
	key, _ := mustRun(t, 0, s.dsn, "", args...)
	return strings.TrimSpace(key)
}

// mustCutOff ends the server's connections to its database, which then accepts no new ones until restore is called.
func (s *testServer) mustCutOff(t testing.TB) (restore func()) {
	t.Helper()
	admin := mustOpen(t, databaseURL("", nil))
	name := mustQuery(t, s.db, `SELECT current_database()`)
	restore = func() {
		t.Helper()
		mustExec(t, admin, `ALTER DATABASE `+name+` ALLOW_CONNECTIONS true`)
	}
	t.Cleanup(restore) // a test that fails before it restores must not leave the database behind
	mustExec(t, admin, `ALTER DATABASE `+name+` ALLOW_CONNECTIONS false`)
	mustExec(t, admin, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
		WHERE datname = $1 AND usename = $2`, name, appRole.name)
	return restore
}

// ---- Keys

func TestEveryKeyIsAnother(t *testing.T) { // S5
	seen := map[string]bool{}
	for range 10_000 {
		key, id, digest := newKey()
		if !wellFormedKey(key) || !strings.HasPrefix(key, "tdb_"+id+"_") {
			t.Fatalf("newKey returns the key %q with the id %q", key, id)
		}
		sum := sha256.Sum256([]byte(key))
		if !bytes.Equal(digest, sum[:]) {
			t.Fatalf("newKey returns the key %q with the digest %x", key, digest)
		}
		secret := key[len("tdb_")+8+1:][:43]
		if seen[secret] {
			t.Fatalf("newKey returns %q twice", secret)
		}
		if strings.Contains(secret, "AAAAAAAA") {
			t.Fatalf("newKey returns %q, which holds a run of zero bits", secret)
		}
		seen[secret] = true
	}
}

func FuzzKey(f *testing.F) {
	key, id, _ := newKey()
	if !wellFormedKey(key) || !strings.HasPrefix(key, "tdb_"+id+"_") || len(id) != 8 {
		f.Fatalf("newKey returns %q, %q", key, id)
	}
	f.Add(key, 5, byte(1))
	f.Add("tdb_", 0, byte(255))
	f.Fuzz(func(t *testing.T, s string, at int, flip byte) {
		if wellFormedKey(s) && (!strings.HasPrefix(s, "tdb_") || len(s) != len(key)) {
			t.Errorf("%q is well-formed", s)
		}
		key, _, _ := newKey()
		typo := []byte(key)
		typo[uint(at)%uint(len(typo))] ^= flip
		if flip != 0 && wellFormedKey(string(typo)) {
			t.Errorf("%q is well-formed, and so is %q", key, typo)
		}
	})
}

// Every test ends with a search of its database for secrets. That search must be able to find one.
func TestSweepFindsSecrets(t *testing.T) { // S6
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	key, _, _ := newKey()
	type secretCase struct{ name, secret, found string }
	cases := []secretCase{
		{"a key", key, "a key"},
		{"the password of the API's role", appRole.password, "a password"},
	}
	if owner, given := mustParse(t, dsn).User.Password(); given && owner != "" {
		cases = append(cases, secretCase{"the owner's password", owner, "a password"})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			mustExec(t, db, `CREATE TABLE leak AS SELECT 'x' || $1::text || 'y' AS held`, c.secret)
			if found := secretsIn(t, dsn); found != c.found {
				t.Errorf("the sweep finds %q, want %q", found, c.found)
			}
			mustExec(t, db, `DROP TABLE leak`)
		})
	}
}

// ---- Who is let in

func TestEveryRouteNeedsAKey(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	paths := []string{
		"/upload", "/values", "/series", "/list_timeseries", "/runs", "/corrections", withdraw(nobody),
		"/", "/healthz", "/docs", "/docs/api.js", "/docs/docs.css", "/openapi.json",
		"/nope", "/values/", "/docs/", "/docs/nope.js", "/values/x", "//values", "/./values", "/upload?x=%zz",
		"/users", "/debug/pprof/", "/.git/config",
	}
	holdNoData := []string{"/", "/healthz", "/docs", "/docs/api.js", "/docs/docs.css", "/openapi.json"}
	methods := []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"}
	for _, path := range paths {
		for _, method := range methods {
			t.Run(method+" "+path, func(t *testing.T) {
				resp, body, err := s.do(method, path, "", "")
				if err != nil {
					t.Fatal(err)
				}
				isRead := method == "GET" || method == "HEAD"
				if isRead && slices.Contains(holdNoData, path) {
					if resp.StatusCode != 200 {
						t.Errorf("status %d, want 200", resp.StatusCode)
					}
				} else {
					if resp.StatusCode != 401 || resp.Header.Get("WWW-Authenticate") != "ApiKey" {
						t.Errorf("status %d, %v, want 401", resp.StatusCode, resp.Header)
					}
					if method != "HEAD" && body != noKey {
						t.Errorf("body %q, want %q", body, noKey)
					}
				}
				for name := range resp.Header {
					if strings.HasPrefix(name, "Access-Control-") { // S24
						t.Errorf("CORS header %s", name)
					}
				}
			})
		}
	}
	for _, c := range []struct{ name, target, status string }{
		{"OPTIONS of the whole server", "OPTIONS *", " 401 "},
		{"GET of the whole server", "GET *", " 40"},
		{"a tunnel", "CONNECT 127.0.0.1:1", " 40"},
		{"a request to a proxy", "GET http://other.example/values", " 40"},
	} {
		t.Run(c.name, func(t *testing.T) {
			line := s.mustRaw(t, c.target+" HTTP/1.1\r\nHost: x\r\n\r\n")
			if !strings.Contains(line, c.status) {
				t.Errorf("%s: %q, want %q in it", c.target, line, c.status)
			}
		})
	}
}

func TestMalformedKeysAreRefusedWithoutALookup(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	// From here on a look-up of a key is answered with 503.
	mustExec(t, s.db, "REVOKE ALL ON keys_table FROM "+appRole.name)
	s.must(t, 503, "GET", "/list_timeseries", key, "")
	for _, c := range []struct {
		name, query string
		header      []string
		want        string
	}{
		{"no key", "", nil, noKey},
		{"an empty header", "", []string{"X-API-Key: "}, noKey},
		{"a key in the query string", "?api_key=" + key + "&X-API-Key=" + key, nil, noKey},
		{"a key in Authorization", "", []string{"Authorization: ApiKey " + key}, noKey},
		{"a key in a cookie", "", []string{"Cookie: X-API-Key=" + key}, noKey},
		{"one letter", "", []string{"X-API-Key: x"}, badKey},
		{"8000 letters", "", []string{"X-API-Key: " + strings.Repeat("k", 8000)}, badKey},
		{"a key and the key again", "", []string{"X-API-Key: " + key + key}, badKey},
		{"a key, a comma and the key again", "", []string{"X-API-Key: " + key + "," + key}, badKey},
		{"the header given twice", "", []string{"X-API-Key: " + key, "X-API-Key: " + key}, badKey},
		{"a key without its last letter", "", []string{"X-API-Key: " + key[:len(key)-1]}, badKey},
		{"a key in capitals", "", []string{"X-API-Key: " + strings.ToUpper(key)}, badKey},
		{"a key with a letter beyond ASCII", "", []string{"X-API-Key: " + key[:20] + "é" + key[22:]}, badKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			if body := s.must(t, 401, "GET", "/list_timeseries"+c.query, "", "", c.header...); body != c.want {
				t.Errorf("%q, want %q", body, c.want)
			}
		})
	}
	// A key in the query string is no key when look-ups work, either.
	mustExec(t, s.db, "GRANT SELECT ON keys_table TO "+appRole.name)
	if body := s.must(t, 401, "GET", "/list_timeseries?api_key="+key, "", ""); body != noKey {
		t.Errorf("a key in the query string: %q", body)
	}
}

func TestAllRefusedKeysGetTheSameBytes(t *testing.T) {
	t.Parallel()
	s, stored := mustTenant(t)
	deactivated := s.mustUser(t, tenantA, "deactivated@example.com")
	s.mustDeactivate(t, "deactivated@example.com")
	expired := s.mustUser(t, tenantA, "expired@example.com")
	s.must(t, 200, "GET", "/list_timeseries", expired, "")
	mustExec(t, s.db, `UPDATE keys_table SET expires_at = clock_timestamp() - interval '1 microsecond'
		WHERE user_id = (SELECT user_id FROM users_table WHERE email = 'expired@example.com')`)
	replaced := s.mustUser(t, tenantA, "replaced@example.com")
	s.mustReplaceKey(t, "replaced@example.com")
	revoked := s.mustUser(t, tenantA, "revoked@example.com")
	mustRun(t, 0, s.dsn, "", "keys", "revoke", "-y", "--key-id", keyID(revoked))

	answer := func(t *testing.T, key string) string {
		t.Helper()
		resp, body, err := s.do("GET", "/values", key, "")
		if err != nil {
			t.Fatal(err)
		}
		resp.Header.Del("Date")
		head, err := httputil.DumpResponse(resp, false)
		if err != nil {
			t.Fatal(err)
		}
		return string(head) + body
	}
	unknown, _, _ := newKey()
	want := answer(t, unknown)
	if !strings.Contains(want, "401") || !strings.Contains(want, badKey) ||
		!strings.Contains(strings.ToLower(want), "www-authenticate: apikey") {
		t.Errorf("an unknown key: %q", want)
	}
	digest := sha256.Sum256([]byte(stored))
	digestInBase64 := base64.RawURLEncoding.EncodeToString(digest[:])
	for _, c := range []struct{ name, key string }{
		{"malformed", "tdb_x"},
		{"deactivated", deactivated},
		{"expired", expired},
		{"replaced", replaced},
		// S4: what a stolen database holds opens nothing.
		{"a stored digest in hex", hex.EncodeToString(digest[:])},
		{"a stored digest in base64", digestInBase64},
		{"a stored digest in the form of a key", withChecksum(stored[:13] + digestInBase64)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := answer(t, c.key); got != want {
				t.Errorf("%q, want the same as for an unknown key: %q", got, want)
			}
		})
	}
}

func TestReadOnlyKeyMayOnlyRead(t *testing.T) { // S17
	t.Parallel()
	s := mustServer(t)
	text, _ := mustRun(t, 0, s.dsn, "",
		"users", "create", "-q", "--read-only", "-t", tenantA, "-e", "reader@example.com")
	key := strings.TrimSpace(text)
	before := s.stored(t)
	for _, rt := range (&server{}).routes() {
		t.Run(rt.pattern, func(t *testing.T) {
			method, path, _ := strings.Cut(strings.TrimSuffix(rt.pattern, "{$}"), " ")
			path = strings.Replace(path, "{file}", "docs.css", 1)
			if rt.access == open || rt.access == reads && method == "GET" {
				s.must(t, 200, method, path, key, "")
				return
			}
			for _, body := range []string{emptyRun, `{"name":"x"}`, `{"updates":[]}`, `{`, ""} {
				s.must(t, 403, method, path, key, body)
			}
			s.must(t, 403, method, path+"?run_start_time=2025-01-01", key, "valid_time,value_key,value\n",
				"Content-Type: text/csv")
		})
	}
	if s.stored(t) != before {
		t.Error("a read-only key stored something")
	}
}

func TestUseOfAKeyIsNoted(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	waitUntil(t, "last_used_at is set", func() bool { // the server writes it after it has answered
		return mustQuery(t, s.db, `SELECT last_used_at FROM key_uses`) != ""
	})
}

// ---- Keys that end

func TestRevokedKeyIsRefusedOnTheNextRequestOfEveryServer(t *testing.T) {
	t.Parallel()
	s, first := mustTenant(t)
	servers := []*testServer{s, mustAPI(t, s.dsn)}
	everywhere := func(want int, key, when string) {
		t.Helper()
		for i, one := range servers {
			resp, _, err := one.do("GET", "/list_timeseries", key, "")
			if err != nil || resp.StatusCode != want {
				t.Fatalf("%s: server %d: %v %v, want status %d", when, i, resp, err, want)
			}
		}
	}
	everywhere(200, first, "new key")
	s.mustDeactivate(t, "a@example.com")
	everywhere(401, first, "deactivated")
	s.mustActivate(t, "a@example.com")
	everywhere(200, first, "activated")

	second := s.mustReplaceKey(t, "a@example.com")
	everywhere(401, first, "replaced")
	everywhere(200, second, "the new key")
	s.mustDeactivate(t, "a@example.com")
	everywhere(401, second, "the new key, deactivated")
	s.mustActivate(t, "a@example.com")
	everywhere(401, first, "activated after it was replaced") // S10
	everywhere(200, second, "the new key, activated")
}

// Clients hammer two servers of one database while a user is deactivated and activated again and again. A request that
// began after deactivate had returned, and was answered before activate began, must not have been let in.
func TestDeactivationHoldsForEveryLaterRequestUnderLoad(t *testing.T) { // S9
	t.Parallel()
	s, key := mustTenant(t)
	servers := []*testServer{s, mustAPI(t, s.dsn)}
	var phase atomic.Int64 // odd while the user is certainly deactivated
	var refused, admitted, wrong atomic.Int64
	ask := func(server *testServer) error {
		before := phase.Load()
		resp, _, err := server.do("GET", "/list_timeseries", key, "")
		if err != nil {
			return err
		}
		after := phase.Load()
		switch resp.StatusCode {
		case 200:
			admitted.Add(1)
			if before == after && before%2 == 1 {
				wrong.Add(1)
			}
		case 401, 429:
			refused.Add(1)
		default:
			return fmt.Errorf("status %d, want 200, 401 or 429", resp.StatusCode)
		}
		return nil
	}
	ctx, stop := context.WithCancel(context.Background())
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			for ctx.Err() == nil {
				if err := ask(servers[i%2]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	stopAndWait := func() {
		stop()
		clients.Wait()
	}
	t.Cleanup(stopAndWait) // the clients must not outlive a test that fails
	failed := func() bool { return wrong.Load() > 0 || t.Failed() }
	const rounds = 80
	for round := 0; round < rounds && !failed(); round++ {
		s.mustDeactivate(t, "a@example.com")
		phase.Add(1)
		enough := refused.Load() + 4
		waitUntil(t, "four more requests were refused", func() bool {
			return refused.Load() >= enough || failed()
		})
		phase.Add(1)
		s.mustActivate(t, "a@example.com")
	}
	stopAndWait()
	if wrong.Load() != 0 {
		t.Errorf("%d requests were admitted after deactivate had returned", wrong.Load())
	}
	if admitted.Load() < rounds || refused.Load() < rounds {
		t.Errorf("in %d rounds only %d requests were admitted and %d refused", rounds, admitted.Load(), refused.Load())
	}
}

func TestKeyEndsWhenItExpires(t *testing.T) { // S10
	t.Parallel()
	s := mustServer(t)
	for i, c := range []struct{ name, expires string }{
		{"days", "90d"},
		{"hours", "12h"},
		{"an ISO 8601 duration", "P1DT1H"},
		{"hours and minutes", "1h30m"},
		{"a date", "2200-01-01"},
		{"a time with an offset", "2199-12-31T23:59:59+05:00"},
	} {
		t.Run(c.name, func(t *testing.T) {
			email := fmt.Sprintf("user%d@example.com", i)
			text, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-t", tenantA, "-e", email, "--expires", c.expires)
			key := strings.TrimPrefix(regexp.MustCompile(`API Key: tdb_\S+`).FindString(text), "API Key: ")
			ends := mustQuery(t, s.db, `SELECT to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI')
				FROM keys_table WHERE key_id = $1`, keyID(key))
			listed, _ := mustRun(t, 0, s.dsn, "", "keys", "list")
			if ends == "" || !strings.Contains(listed, ends) || !strings.Contains(text, ends) {
				t.Errorf("the key ends at %q; users create prints %q; the list is\n%s", ends, text, listed)
			}
			s.must(t, 200, "GET", "/list_timeseries", key, "")

			mustExec(t, s.db, `UPDATE keys_table SET expires_at = clock_timestamp() WHERE key_id = $1`, keyID(key))
			s.must(t, 401, "GET", "/list_timeseries", key, "")
			listed, _ = mustRun(t, 0, s.dsn, "", "keys", "list")
			if !regexp.MustCompile(email + `.* expired `).MatchString(listed) {
				t.Errorf("the list does not say that the key has expired:\n%s", listed)
			}
		})
	}
	for _, c := range []struct{ name, expires string }{
		{"nothing is refused", ""},
		{"a word is refused", "soon"},
		{"a date in the past is refused", "2020-01-01"},
		{"a negative duration is refused", "-1h"},
		{"a duration of zero is refused", "0s"},
		{"a number without a unit is refused", "90"},
		{"a month is refused", "P1M"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, s.dsn, "", "users", "create", "-t", tenantA, "-e", "late@example.com", "--expires", c.expires)
		})
	}
}

func TestUserHasAnyNumberOfKeys(t *testing.T) {
	t.Parallel()
	s, first := mustTenant(t)
	create := func(name string, flags ...string) string {
		t.Helper()
		args := append([]string{"keys", "create", "-q", "-e", "a@example.com", "--name", name}, flags...)
		key, _ := mustRun(t, 0, s.dsn, "", args...)
		return strings.TrimSpace(key)
	}
	laptop := create("laptop")
	reader := create("report", "--read-only", "--expires", "90d")
	for _, key := range []string{first, laptop, reader} {
		s.must(t, 200, "GET", "/values", key, "")
	}
	s.must(t, 200, "POST", "/upload", laptop, oneValue)
	s.must(t, 403, "POST", "/upload", reader, oneValue)

	before := users(t, s.db)
	for _, c := range []struct {
		name, says string
		exit       int
		args       string
	}{
		{"a name in use", "a key of the name 'Laptop' already", 1, "keys create -e a@example.com --name Laptop"},
		{"no name", "--name is required", 2, "keys create -e a@example.com"},
		{"an unknown user", "no user has the email", 1, "keys create -e x@example.com --name x"},
		{"an end in the past", "--expires", 2, "keys create -e a@example.com --name x --expires 2020-01-01"},
		{"an unknown key", "no key has this id", 1, "keys revoke -y --key-id aaaaaaaa"},
		{"no key", "--key-id is required", 2, "keys revoke -y"},
		{"nobody to ask", "-y", 1, "keys revoke --key-id " + keyID(laptop)},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, stderr := mustRun(t, c.exit, s.dsn, "", strings.Fields(c.args)...)
			expectWords(t, stderr, c.says)
			if users(t, s.db) != before {
				t.Error("it changed something")
			}
		})
	}

	stdout, _ := mustRun(t, 0, s.dsn, "y\n", "keys", "revoke", "--key-id", keyID(laptop))
	expectWords(t, stdout, "Revoked", `"laptop"`)
	s.must(t, 401, "GET", "/values", laptop, "")
	s.must(t, 200, "GET", "/values", first, "")
	s.must(t, 200, "GET", "/values", reader, "")
	again := create("laptop") // the name is free again
	s.must(t, 200, "GET", "/values", again, "")

	s.mustDeactivate(t, "a@example.com")
	for _, key := range []string{first, again, reader} {
		s.must(t, 401, "GET", "/values", key, "")
	}
	s.mustActivate(t, "a@example.com")
	s.must(t, 401, "GET", "/values", laptop, "")
	only := s.mustReplaceKey(t, "a@example.com")
	for _, key := range []string{first, again, reader} {
		s.must(t, 401, "GET", "/values", key, "")
	}
	s.must(t, 200, "GET", "/values", only, "")
	mustRun(t, 0, s.dsn, "", "keys", "revoke", "-y", "--key-id", keyID(only))
	_, stderr := mustRun(t, 1, s.dsn, "", "users", "regenerate-key", "-y", "-e", "a@example.com")
	expectWords(t, stderr, "no key to replace", "keys create")
}

// Deactivation ends graces for good, also one that is being given while it begins.
func TestDeactivationEndsAGraceThatIsBeingGiven(t *testing.T) { // S10
	t.Parallel()
	s, old := mustTenant(t)
	// Both commands wait for the user's row, the replacement first.
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT FROM users_table FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	waiting := func(n int) func() bool {
		return func() bool {
			return mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
				WHERE datname = current_database() AND wait_event_type = 'Lock'`) == strconv.Itoa(n)
		}
	}
	var commands sync.WaitGroup
	commands.Go(func() { s.mustReplaceKey(t, "a@example.com", "--grace", "24h") })
	waitUntil(t, "the replacement waits", waiting(1))
	commands.Go(func() { s.mustDeactivate(t, "a@example.com") })
	waitUntil(t, "the deactivation waits", waiting(2))
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	commands.Wait()
	s.mustActivate(t, "a@example.com")
	s.must(t, 401, "GET", "/values", old, "")
}

func TestNewKeyInheritsTheWidestAccessAndTheLatestEnd(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	for i, c := range []struct {
		name    string
		keys    []string // flags of the user's keys; the first is that of users create
		flags   string   // of regenerate-key
		access  string
		expires string // YYYY-MM-DD, or ""
	}{
		{"one key", []string{"--read-only --expires 2100-01-01"}, "", "ro", "2100-01-01"},
		{"one may write", []string{"--read-only", ""}, "", "rw", ""},
		{"all have an end", []string{"--expires 2100-01-01", "--expires 2101-01-01", "--expires 2099-01-01"}, "", "rw", "2101-01-01"},
		{"one has no end", []string{"--expires 2100-01-01", "--read-only"}, "", "rw", ""},
		{"an end that is asked for", []string{""}, "--expires 2098-01-01", "rw", "2098-01-01"},
		{"with a grace", []string{"--read-only --expires 2100-01-01"}, "--grace 1h", "ro", "2100-01-01"},
		{"not of a key that was replaced before", []string{""}, "--grace 1h --expires 2100-01-01, ", "rw", "2100-01-01"},
		{"not of an expired key", []string{"--expires 2100-01-01", "--read-only --expires 2101-01-01"},
			"EXPIRED --grace 0s", "ro", "2101-01-01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			email := fmt.Sprintf("user%d@example.com", i)
			mustRun(t, 0, s.dsn, "", strings.Fields("users create -t "+tenantA+" -e "+email+" "+c.keys[0])...)
			for n, flags := range c.keys[1:] {
				mustRun(t, 0, s.dsn, "", strings.Fields(fmt.Sprintf("keys create -e %s --name k%d %s", email, n, flags))...)
			}
			key := ""
			for flags := range strings.SplitSeq(c.flags, ",") {
				if rest, found := strings.CutPrefix(flags, "EXPIRED"); found {
					flags = rest
					mustExec(t, s.db, `UPDATE keys_table SET expires_at = now()
						WHERE name = 'default' AND user_id = (SELECT user_id FROM users_table WHERE email = $1)`, email)
				}
				key = s.mustReplaceKey(t, email, strings.Fields(flags)...)
			}
			got := mustQuery(t, s.db, `SELECT access || ' ' || coalesce(to_char(expires_at, 'YYYY-MM-DD'), '')
				FROM keys_table WHERE key_id = $1`, keyID(key))
			if got != c.access+" "+c.expires {
				t.Errorf("the new key has %q, want %q", got, c.access+" "+c.expires)
			}
		})
	}
}

func TestReplacedKeyWorksUntilItsGraceEnds(t *testing.T) { // S10
	t.Parallel()
	s, first := mustTenant(t)
	keys := []string{first} // all that there have been, the oldest first
	replace := func(flags ...string) string {
		t.Helper()
		key := s.mustReplaceKey(t, "a@example.com", flags...)
		keys = append(keys, key)
		return key
	}
	// onlyThese checks that the server admits these of the keys and refuses all others.
	onlyThese := func(when string, admitted ...string) {
		t.Helper()
		for i, key := range keys {
			want := 401
			if slices.Contains(admitted, key) {
				want = 200
			}
			resp, _, err := s.do("GET", "/list_timeseries", key, "")
			if err != nil || resp.StatusCode != want {
				t.Errorf("%s: key %d: %v %v, want status %d", when, i, resp, err, want)
			}
		}
	}

	second := replace("--grace", "1h")
	onlyThese("in its grace", first, second)
	mustExec(t, s.db, `UPDATE users_table SET is_active = false`)
	onlyThese("deactivated")
	mustExec(t, s.db, `UPDATE users_table SET is_active = true`)
	mustExec(t, s.db, `UPDATE keys_table SET expires_at = clock_timestamp()`)
	onlyThese("expired")
	mustExec(t, s.db, `UPDATE keys_table SET expires_at = NULL`)
	mustExec(t, s.db, `UPDATE keys_table SET revoked_at = clock_timestamp() WHERE has_grace`)
	onlyThese("after its grace", second)
	s.mustActivate(t, "a@example.com")
	onlyThese("activated after its grace", second)

	third := replace("--grace", "PT24H")
	onlyThese("replaced twice", second, third)
	fourth := replace("--grace", "1d")
	onlyThese("each of the keys before has its own grace", second, third, fourth)
	fifth := replace()
	onlyThese("replaced without a grace", fifth)

	sixth := replace("--grace", "30d")
	s.mustDeactivate(t, "a@example.com")
	onlyThese("deactivated in a grace")
	s.mustActivate(t, "a@example.com")
	onlyThese("activated after deactivation has ended the grace", sixth)

	mustExec(t, s.db, `UPDATE keys_table SET expires_at = clock_timestamp()`)
	_, stderr := mustRun(t, 1, s.dsn, "", "users", "regenerate-key", "-q", "-y", "-e", "a@example.com")
	if !strings.Contains(stderr, "--expires") {
		t.Errorf("a new key for an expired user: %q", stderr)
	}
	seventh := replace("--expires", "90d", "--grace", "1h")
	onlyThese("replaced after it had expired", seventh)

	s.mustDeactivate(t, "a@example.com")
	eighth := replace("--grace", "1h")
	s.mustActivate(t, "a@example.com")
	onlyThese("replaced while it was deactivated", eighth)

	for _, c := range []struct{ name, grace string }{
		{"nothing is refused", ""},
		{"a negative duration is refused", "-1h"},
		{"a word is refused", "long"},
		{"a year is refused", "P1Y"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, s.dsn, "", "users", "regenerate-key", "-y", "-e", "a@example.com", "--grace", c.grace)
		})
	}
	onlyThese("after refused commands", eighth)
}

// ---- Doubt

func TestDoubtNeverOpensTheDoor(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	explains := regexp.MustCompile(`pq:|users_table|load|SELECT`)
	mustBeClosed := func(t *testing.T) {
		t.Helper()
		for _, path := range []string{"/values", "/list_timeseries", "/nope"} {
			for _, sent := range []string{key, ""} {
				resp, body, err := s.do("GET", path, sent, "")
				if err != nil {
					t.Errorf("GET %s: %v", path, err)
					continue
				}
				isRefused := resp.StatusCode == 401 && sent == ""
				if resp.StatusCode != 503 && !isRefused {
					t.Errorf("GET %s: status %d, want 503", path, resp.StatusCode)
					continue
				}
				if resp.StatusCode == 503 && resp.Header.Get("Retry-After") == "" {
					t.Errorf("GET %s: 503 without Retry-After: %v", path, resp.Header)
				}
				if explains.MatchString(body) {
					t.Errorf("GET %s: the body explains: %q", path, body)
				}
			}
		}
	}
	mustServeAgain := func(t *testing.T, key string) {
		t.Helper()
		last := ""
		for range 100 { // a statement that was planned before may fail once on each connection
			resp, _, err := s.do("GET", "/list_timeseries", key, "")
			if err == nil && resp.StatusCode == 200 {
				return
			}
			last = fmt.Sprint(resp, err)
		}
		t.Fatalf("after the fault was undone: %s, want 200", last)
	}

	for _, c := range []struct{ name, breaks, undo string }{
		{
			"users_table has another name",
			`ALTER TABLE users_table RENAME TO elsewhere`,
			`ALTER TABLE elsewhere RENAME TO users_table`,
		},
		{
			"users_table may not be read",
			`REVOKE SELECT ON users_table FROM ` + appRole.name,
			`GRANT SELECT ON users_table TO ` + appRole.name,
		},
		{
			"keys_table may not be read",
			`REVOKE SELECT ON keys_table FROM ` + appRole.name,
			`GRANT SELECT ON keys_table TO ` + appRole.name,
		},
		{
			"keys_table has another name",
			`ALTER TABLE keys_table RENAME TO elsewhere`,
			`ALTER TABLE elsewhere RENAME TO keys_table`,
		},
		{
			"a column of users_table has another name",
			`ALTER TABLE users_table RENAME COLUMN is_active TO was_active`,
			`ALTER TABLE users_table RENAME COLUMN was_active TO is_active`,
		},
		{
			"users_table is in another schema",
			`CREATE SCHEMA hidden; ALTER TABLE users_table SET SCHEMA hidden`,
			`ALTER TABLE hidden.users_table SET SCHEMA public; DROP SCHEMA hidden`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustExec(t, s.db, c.breaks)
			mustBeClosed(t)
			mustExec(t, s.db, c.undo)
			mustServeAgain(t, key)
		})
	}
	t.Run("the database accepts no connections", func(t *testing.T) {
		restore := s.mustCutOff(t)
		mustBeClosed(t)
		s.must(t, 503, "GET", "/healthz", "", "")
		restore()
		mustServeAgain(t, key)
	})
	t.Run("users_table is gone", func(t *testing.T) {
		mustExec(t, s.db, `DROP TABLE users_table CASCADE`)
		mustBeClosed(t)
	})
	t.Run("users_table is new and values_table is gone", func(t *testing.T) {
		mustCreateTables(t, s.dsn, "--with-users")
		newer := s.mustUser(t, tenantA, "a@example.com")
		mustServeAgain(t, newer)
		mustExec(t, s.db, `DROP TABLE values_table CASCADE`)
		s.must(t, 503, "GET", "/values", newer, "")
		s.must(t, 503, "GET", "/values?mode=overlapping&detail=true", newer, "")
	})
}

// A server that has never seen a users_table must still not take doubt for its absence.
func TestUnknownStateOfUsersTableIsNotOpen(t *testing.T) {
	t.Parallel()
	s := mustServerWithoutUsers(t)
	s.must(t, 200, "GET", "/list_timeseries", "", "")

	// The server can read the data, but cannot find out whether there is a users_table.
	mustExec(t, s.db, `REVOKE SELECT ON pg_catalog.pg_class FROM PUBLIC`)
	s.must(t, 503, "GET", "/list_timeseries", "", "")
	s.must(t, 503, "POST", "/upload", "", oneValue)
	mustExec(t, s.db, `GRANT SELECT ON pg_catalog.pg_class TO PUBLIC`)
	s.must(t, 200, "GET", "/list_timeseries", "", "")

	restore := s.mustCutOff(t)
	s.must(t, 503, "GET", "/list_timeseries", "", "")
	s.must(t, 503, "POST", "/upload", "", oneValue)
	restore()
}

func TestServerThatStartedWithUsersNeverOpens(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	mustExec(t, s.db, `ALTER TABLE users_table RENAME TO x`) // before the first request
	s.must(t, 401, "GET", "/values", "", "")
	key, _, _ := newKey()
	s.must(t, 503, "GET", "/values", key, "")
}

func TestFirstUsersTableTakesEffectOnARunningServer(t *testing.T) {
	t.Parallel()
	s := mustServerWithoutUsers(t)
	s.must(t, 200, "POST", "/upload", "", oneValue)

	// Without --app-role the server may not look keys up yet.
	mustRun(t, 0, s.dsn, "", "create", "tables", "-y", "--with-users")
	s.must(t, 401, "GET", "/values", "", "")
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 503, "GET", "/values", key, "")
	mustCreateTables(t, s.dsn)
	if text := s.must(t, 200, "GET", "/values", key, ""); strings.Contains(text, "load") {
		t.Errorf("a tenant sees what was stored without users: %s", text)
	}

	// The server has seen users_table: from now on its absence is a fault.
	mustRun(t, 0, s.dsn, "", "delete", "tables", "-y")
	mustCreateTables(t, s.dsn)
	s.must(t, 503, "GET", "/values", key, "")
	s.must(t, 401, "GET", "/values", "", "")
}

// ---- Without users

func TestRequireAuthRefusesEveryoneWithoutUsersTable(t *testing.T) {
	t.Parallel()
	s := mustServerWithoutUsers(t, "--require-auth")
	unknown, _, _ := newKey()
	for _, c := range []struct{ name, key string }{
		{"no key", ""},
		{"an unknown key", unknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, 503, "GET", "/list_timeseries", c.key, "")
			s.must(t, 503, "POST", "/upload", c.key, emptyRun)
		})
	}
	s.must(t, 200, "GET", "/", "", "")
}

func TestOpenModeIsNotForWebPages(t *testing.T) { // S24
	t.Parallel()
	s := mustServerWithoutUsers(t)
	port := s.url[strings.LastIndex(s.url, ":"):]
	for _, c := range []struct {
		name   string
		status int
		header []string
	}{
		{"a program", 200, nil},
		{"localhost", 200, []string{"Host: localhost" + port}},
		{"the loopback address of IPv6", 200, []string{"Host: [::1]" + port}},
		{"the server's own page", 200, []string{"Origin: " + s.url}},
		{"another host", 403, []string{"Host: evil.example"}},
		{"another host with the server's port", 403, []string{"Host: evil.example" + port}},
		{"another host that starts like this one", 403, []string{"Host: 127.0.0.1.evil.example"}},
		{"another address", 403, []string{"Host: 192.0.2.1" + port}},
		{"a page of another origin", 403, []string{"Origin: https://evil.example"}},
		{"a page without an origin", 403, []string{"Origin: null"}},
		{"a page of another site", 403, []string{"Sec-Fetch-Site: cross-site"}},
		{"a page of another host of the site", 403, []string{"Sec-Fetch-Site: same-site"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, c.status, "POST", "/upload", "", emptyRun, c.header...)
		})
	}
	s.must(t, 403, "GET", "/values", "", "", "Host: evil.example")
	if line := s.mustRaw(t, "GET /values HTTP/1.1\r\nHost:\r\n\r\n"); !strings.Contains(line, " 403 ") {
		t.Errorf("an empty Host is answered %q", line)
	}
}

// A server on all addresses may be called by any of them. A name may be a foreign page's own.
func TestOpenModeOnAllAddressesTakesNoName(t *testing.T) { // S24
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn, "--host", "0.0.0.0", "--allow-anonymous")
	for _, c := range []struct {
		name, host string
		status     int
	}{
		{"an address", "192.0.2.1", 200},
		{"an address of IPv6", "[2001:db8::1]:8000", 200},
		{"localhost", "localhost", 200},
		{"a name", "evil.example", 403},
		{"a name that begins like an address", "192.0.2.1.evil.example", 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, c.status, "GET", "/values", "", "", "Host: "+c.host)
		})
	}
}

// ---- Throttling and the log

func TestTooManyBadKeysAreThrottledAndValidOnesAreNot(t *testing.T) { // S31, S27
	t.Parallel()
	s, key := mustTenant(t)
	unknown, _, _ := newKey()
	const tries = 3 * failureBurst
	begin := time.Now()
	statuses := map[int]int{}
	for i := range tries {
		bad := "x"
		if i%2 == 1 {
			bad = unknown
		}
		// The address that counts is that of the connection, whatever the request says.
		resp, body, err := s.do("GET", "/values", bad, "", fmt.Sprintf("X-Forwarded-For: 192.0.2.%d", i%200))
		if err != nil {
			t.Fatal(err)
		}
		statuses[resp.StatusCode]++
		if resp.StatusCode == 401 && body != badKey {
			t.Fatalf("401 with the body %q, want %q", body, badKey)
		}
		if resp.StatusCode == 429 && !strings.Contains(body, "minute") {
			t.Fatalf("429 with the body %q, which does not say when to try again", body)
		}
		if i%100 == 0 {
			s.must(t, 200, "GET", "/list_timeseries", key, "")
			s.must(t, 401, "GET", "/list_timeseries", "", "") // a missing key is not a bad key
		}
	}
	// More than failureBurst may get 401: the server counts anew when a minute is over.
	if statuses[401] < failureBurst || statuses[429] == 0 || statuses[401]+statuses[429] != tries {
		t.Errorf("%d bad keys were answered %v", tries, statuses)
	}
	for range tries {
		s.must(t, 401, "GET", "/list_timeseries", "", "")
	}

	s.stop()
	lines := 0
	for line := range strings.SplitSeq(s.log.String(), "\n") {
		if strings.Contains(line, "msg=request") && !strings.Contains(line, "status=200") {
			lines++
		}
	}
	minutes := int(time.Since(begin).Minutes()) + 1
	if lines < addressLines || lines > 2*addressLines*minutes { // of 401 and of 429
		t.Errorf("%d refused requests of %d minutes are in the log as %d lines", 2*tries, minutes, lines)
	}
	if strings.Contains(s.log.String(), "192.0.2.") {
		t.Error("the log takes an address from X-Forwarded-For")
	}
}

func TestMemoryOfTheThrottleIsBounded(t *testing.T) { // S31
	t.Parallel()
	var counted tally
	for i := range 3 * maxSources {
		n := counted.add(source{address: fmt.Sprintf("2001:db8::%x", i)})
		if i < maxSources && n != 1 {
			t.Fatalf("the first failure of an address counts as %d", n)
		}
		if len(counted.counts) > maxSources+1 { // and those that are counted together
			t.Fatalf("%d addresses are remembered", len(counted.counts))
		}
	}
	if n := counted.add(source{address: "2001:db8::1"}); n != 2 {
		t.Errorf("a known address is counted with the others: %d", n)
	}
	counted.endMinute()
	for want := 1; want <= 5; want++ {
		if n := counted.add(source{address: "192.0.2.1"}); n != want {
			t.Errorf("failure %d of an address counts as %d", want, n)
		}
	}
}

// recordedKeys is a keyStore that knows one key, by whatever digest it is asked for.
type recordedKeys struct {
	record func(digest []byte) keyRecord
}

func (k recordedKeys) UsersTableExists(context.Context) (bool, error) { return true, nil }

func (k recordedKeys) LookupKey(_ context.Context, digest []byte) (keyRecord, error) {
	return k.record(digest), nil
}

func (k recordedKeys) TouchKey(context.Context, string) error { return nil }

// timelessRecorder takes an answer and a deadline for it, which it does not keep.
type timelessRecorder struct{ *httptest.ResponseRecorder }

func (timelessRecorder) SetWriteDeadline(time.Time) error { return nil }

// A leaked key that is still tried must be seen, whatever else comes from its address; and what comes must not fill
// the disk.
func TestFloodsLeaveBoundedLinesAndTheDeadKeysOwn(t *testing.T) { // S40
	t.Parallel()
	key, id, _ := newKey()
	const flood = 2*addressLines + failureBurst
	for _, c := range []struct {
		name, path, key string
		known           bool // to the store, as a key that was revoked
		line            string
		lines           int
		rest            string
	}{
		{"unknown keys", "/values", key, false, `status=401 .*reason="unknown key" .*key_id=` + id, failureBurst,
			fmt.Sprintf(`count=%d status=429 remote=192.0.2.1 key_id=""`, addressLines)},
		{"no key", "/values", "", false, `status=401 .*reason="no key"`, addressLines,
			fmt.Sprintf(`count=%d status=401 remote=192.0.2.1 key_id=""`, flood-addressLines)},
		{"open routes", "/", "", false, `route="GET /{\$}"`, addressLines,
			fmt.Sprintf(`count=%d status=200 remote=192.0.2.1 key_id=""`, flood-addressLines)},
		{"a dead key", "/values", key, true, `reason="revoked key" .*key_id=leakedid`, deadKeyLines,
			fmt.Sprintf(`count=%d status=0 remote=192.0.2.1 key_id=leakedid`, flood-deadKeyLines)},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				revokedAt := time.Now()
				keys := recordedKeys{record: func(digest []byte) keyRecord {
					if !c.known {
						return keyRecord{}
					}
					return keyRecord{id: "leakedid", digest: digest, now: revokedAt, revokedAt: &revokedAt}
				}}
				var log logBuffer
				s := newServer(nil, keys, &authenticator{keys: keys}, slog.New(slog.NewTextHandler(&log, nil)))
				ask := func() {
					r := httptest.NewRequest("GET", c.path, nil)
					if c.key != "" {
						r.Header.Set("X-API-Key", c.key)
					}
					s.ServeHTTP(timelessRecorder{httptest.NewRecorder()}, r)
				}
				line := regexp.MustCompile(c.line)
				for range flood {
					ask()
				}
				if got := len(line.FindAllString(log.String(), -1)); got != c.lines {
					t.Errorf("%d requests left %d lines, want %d", flood, got, c.lines)
				}
				time.Sleep(time.Minute + time.Second)
				synctest.Wait()
				expectWords(t, log.String(), `msg="requests without a line" `+c.rest)
				ask()
				if got := len(line.FindAllString(log.String(), -1)); got != c.lines+1 {
					t.Errorf("after the minute there are %d lines, want one more", got)
				}
			})
		})
	}
}

func TestLogNamesEachKeyAndWhyItWasRefused(t *testing.T) { // S27, S40
	t.Parallel()
	s, working := mustTenant(t)
	expired := s.mustUser(t, tenantA, "expired@example.com")
	mustExec(t, s.db, `UPDATE keys_table SET expires_at = clock_timestamp() WHERE key_id = $1`, keyID(expired))
	replaced := s.mustUser(t, tenantA, "replaced@example.com")
	s.mustReplaceKey(t, "replaced@example.com")
	revoked := s.mustUser(t, tenantA, "revoked@example.com")
	mustRun(t, 0, s.dsn, "", "keys", "revoke", "-y", "--key-id", keyID(revoked))
	deactivated := s.mustUser(t, tenantA, "deactivated@example.com")
	s.mustDeactivate(t, "deactivated@example.com")
	unknown, _, _ := newKey()
	for _, c := range []struct {
		name, key string
		status    int
	}{
		{"unknown", unknown, 401},
		{"expired", expired, 401},
		{"replaced", replaced, 401},
		{"revoked", revoked, 401},
		{"deactivated", deactivated, 401},
		{"", working, 200},
	} {
		t.Run("a key that is "+c.name, func(t *testing.T) {
			s.must(t, c.status, "GET", "/runs", c.key, "")
			reason := `""`
			if c.name != "" {
				reason = `"` + c.name + ` key"`
			}
			line := regexp.MustCompile(fmt.Sprintf(`route="GET /runs" status=%d broken=false reason=%s remote=127.0.0.1:\d+ tenant=\S+ key_id=%s`,
				c.status, reason, keyID(c.key)))
			waitUntil(t, "the line is there", func() bool { return line.MatchString(s.log.String()) })
		})
	}
}

// Whatever a client sends, neither a key nor a text of a row gets into the log by it.
func TestNothingOfARequestIsInTheLog(t *testing.T) { // S40
	t.Parallel()
	s, key := mustTenant(t)
	const word = "Confidential"
	for _, c := range []struct{ name, method, path, body string }{
		{"method", key, "/values", ""},
		{"method of words", word, "/values", ""},
		{"path", "GET", "/" + word + "/" + key, ""},
		{"query", "GET", "/values?" + word + "=" + key, ""},
		{"value of a parameter", "GET", "/values?series_key=" + word + "&start_valid=" + key, ""},
		{"key of a series", "GET", "/values?series_key=" + word + key, ""},
		{"member", "POST", "/upload", `{"` + word + key + `":1}`},
		{"text of a row", "POST", "/upload", runWith("", `{"valid_time":"`+word+key+`","value_key":"x","value":1}`)},
		{"value of a row", "POST", "/upload", runWith("", `{"valid_time":"2025-01-01","value_key":"x","value":"`+word+key+`"}`)},
		{"annotation", "PUT", "/values", `{"updates":[{"valid_time":"2025-01-01","series_key":"x","annotation":"` + word + key + `\u0000"}]}`},
		{"name of a series", "POST", "/series", `{"name":"` + word + key + `\u0000"}`},
		{"params that PostgreSQL refuses", "POST", "/upload", runWith(`"run_params":{"x":"\u0000` + word + `"},`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, _, err := s.do(c.method, c.path, key, c.body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode == 500 {
				t.Errorf("status %d", resp.StatusCode)
			}
		})
	}
	t.Run("PostgreSQL's words on data", func(t *testing.T) {
		_, err := s.db.Exec(`SELECT '` + word + `'::uuid`)
		if got := causeOf(err); strings.Contains(got, word) || !strings.Contains(got, "22P02") {
			t.Errorf("of %v the log says %q", err, got)
		}
	})
	s.stop()
	if n := strings.Count(s.log.String(), "msg=request "); n != 12 {
		t.Errorf("the log has %d lines of 12 requests", n)
	}
	for _, secret := range []string{word, key[13:]} {
		if strings.Contains(s.log.String(), secret) {
			t.Errorf("the log holds %q: %s", secret, s.log)
		}
	}
}

func TestLogTellsWhoAndWhyAndCannotBeForged(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	unknown, _, _ := newKey()
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	s.must(t, 401, "GET", "/list_timeseries", unknown, "")
	s.mustDeactivate(t, "a@example.com")
	s.must(t, 401, "GET", "/list_timeseries", key, "")
	s.mustActivate(t, "a@example.com")

	for _, c := range []struct{ name, path string }{
		{"a whole line", "/x%0d%0atime=2025-01-01T00:00:00Z%20level=INFO%20msg=forged"},
		{"a line feed", "/x%0alevel=INFO"},
		{"an escape sequence of the terminal", "/%1b[2Jx"},
		{"a line separator of Unicode", "/%e2%80%a8x"},
		{"a zero byte", "/%00"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, 404, "GET", c.path, key, "")
			s.must(t, 401, "GET", c.path, "", "")
		})
	}
	s.must(t, 422, "GET", "/values?series_key=a%0d%0alevel=INFO%20msg=forged&nope=1", key, "")
	s.must(t, 401, "GET", "/"+unknown[:12]+"%0d%0aforged", "x", "")

	// A key may be pasted into the wrong place.
	s.must(t, 404, "GET", "/"+key, key, "")
	s.must(t, 422, "GET", "/values?limit="+key, key, "")
	s.must(t, 404, "GET", "/values?series_key="+key, key, "")
	s.must(t, 422, "GET", "/values?"+key+"=1", key, "")

	s.stop()
	logged := s.log.String()
	for line := range strings.Lines(logged) {
		if !strings.HasPrefix(line, "time=") || !strings.Contains(line, "Z level=") {
			t.Errorf("a log line that is not ours, or not in UTC: %q", line)
		}
	}
	if strings.ContainsAny(logged, "\x1b\r\x00") || strings.Contains(logged, "\u2028") {
		t.Error("the log holds control characters")
	}
	for _, want := range []string{keyID(key), keyID(unknown), tenantA, "127.0.0.1:", "status=200", "status=401", "deactivated", "unknown"} {
		if !strings.Contains(logged, want) {
			t.Errorf("the log has no %q:\n%s", want, logged)
		}
	}
	for _, secret := range []string{key[13:], unknown[13:]} {
		if strings.Contains(logged, secret) {
			t.Error("the log holds a key")
		}
	}
}

// This runs the program itself, in a time zone that is not UTC.
func TestProgramLogsInUTCAndStopsOnSIGTERM(t *testing.T) { // S27, S30
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	binary := filepath.Join(t.TempDir(), "timedb")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v %s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), binary, "api", "--port", strconv.Itoa(freePort(t)))
	cmd.Env = append(os.Environ(), "TZ=Asia/Tokyo", "TIMEDB_DSN="+asAppRole(dsn))
	var printed, logged logBuffer
	cmd.Stdout = &printed
	cmd.Stderr = &logged
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the program says that it serves", func() bool { return servesLine.MatchString(printed.String()) })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("stopped by SIGTERM: %v", err)
	}
	startsInUTC := regexp.MustCompile(`^time=\S+Z level=`)
	for line := range strings.Lines(logged.String()) {
		if !startsInUTC.MatchString(line) {
			t.Errorf("a line that is not in UTC: %q", line)
		}
	}
	if !strings.Contains(logged.String(), "stopping") {
		t.Errorf("the log is %q", logged.String())
	}
}

// ---- Tenants

func TestTenantInTheRequestChangesNothing(t *testing.T) { // S13
	t.Parallel()
	s, a := mustTenant(t)
	b := s.mustUser(t, tenantB, "b@example.com")
	s.must(t, 200, "POST", "/upload", a, oneValue)
	before := s.stored(t)
	uploadForA := strings.Replace(oneValue, `{`, `{"tenant_id":"`+tenantA+`",`, 1)
	updateForA := `{"updates":[{"tenant_id":"` + tenantA + `",
		"valid_time":"2025-01-01","series_key":"load","value":5}]}`
	refused := []string{"tenant_id"}
	nothing := []string{`"count":0`}
	s.runRequests(t, b, []requestCase{
		{"an upload that names another tenant", "POST", "/upload", uploadForA, 403, refused},
		{"an upload to another tenant's URL", "POST", "/upload?tenant_id=" + tenantA, oneValue, 403, refused},
		{"a correction that names another tenant", "PUT", "/values", updateForA, 403, refused},
		{"another tenant's runs", "GET", "/runs?tenant_id=" + tenantA, "", 403, refused},
		{"another tenant's values", "GET", "/values?tenant_id=" + tenantA, "", 403, refused},
		{"another tenant's series", "GET", "/list_timeseries?tenant_id=" + tenantA, "", 403, refused},
		{"a tenant that is no UUID", "GET", "/values?tenant_id=nonsense", "", 422, refused},
		{"the own tenant in capitals", "GET", "/values?tenant_id=" + strings.ToUpper(tenantB), "", 200, nothing},
	})
	for _, c := range []struct{ name, header string }{
		{"X-Tenant-ID", "X-Tenant-ID: " + tenantA},
		{"Tenant-Id", "Tenant-Id: " + tenantA},
		{"X-Forwarded-User", "X-Forwarded-User: " + tenantA},
		{"a cookie", "Cookie: tenant_id=" + tenantA},
	} {
		t.Run(c.name, func(t *testing.T) {
			if text := s.must(t, 200, "GET", "/values", b, "", c.header); strings.Contains(text, "load") {
				t.Errorf("%s opens another tenant: %s", c.header, text)
			}
		})
	}
	if s.stored(t) != before {
		t.Error("a refused request stored something")
	}
	// A tenant may name itself.
	s.must(t, 200, "POST", "/upload", a, strings.Replace(emptyRun, `{`, `{"tenant_id":"`+tenantA+`",`, 1))
}

func TestIDsOfAnotherTenantAreLikeIDsThatNeverExisted(t *testing.T) { // S16
	t.Parallel()
	s, a := mustTenant(t)
	b := s.mustUser(t, tenantB, "b@example.com")
	uploaded := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", a, oneValue))
	seriesA, runA := uploaded.SeriesIDs["load"], uploaded.RunID
	ownValue := strings.NewReplacer("load", "own", "known_time", "run_finish_time").Replace(oneValue)
	seriesB := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", b, ownValue)).SeriesIDs["own"]
	s.must(t, 200, "PUT", "/values", a, update(`"value":2`))
	before := s.stored(t)
	dataOfA := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, "")

	// Each of these is asked twice by tenant B: with something of tenant A's in place of ID, then with something that
	// never existed.
	const endOfRow = `"valid_time":"2025-01-01T00:00:00Z","value":7}]}`
	const startOfRun = `{"run_start_time":"2025-01-01","value_rows":[`
	const csvRow = "valid_time,value,series_id\n2025-01-01,1,ID\n"
	type probe struct{ name, route, query, body, theirs, never string }
	probes := []probe{
		{"read a series by id", "GET /values", "?series_id=ID", "", seriesA, nobody},
		{"read a series by key", "GET /values", "?series_key=ID", "", "load", "liad"},
		{"read a series beside an own one", "GET /values",
			"?mode=overlapping&series_id=" + seriesB + "&series_id=ID", "", seriesA, nobody},
		{"read a series beside a match", "GET /values", "?match=*&series_key=ID", "", "load", "liad"},
		{"read a run", "GET /values", "?run_id=ID", "", runA, nobody},
		{"list the runs of a series", "GET /runs", "?series_key=ID", "", "load", "liad"},
		{"correct a series by id", "PUT /values", "", `{"updates":[{"series_id":"ID",` + endOfRow, seriesA, nobody},
		{"correct a series by key", "PUT /values", "", `{"updates":[{"series_key":"ID",` + endOfRow, "load", "liad"},
		{"correct another's run of another's series", "PUT /values", "",
			`{"updates":[{"series_id":"` + seriesA + `","run_id":"ID",` + endOfRow, runA, nobody},
		{"correct another's run of an own series", "PUT /values", "",
			`{"updates":[{"series_key":"own","run_id":"ID",` + endOfRow, runA, nobody},
		{"correct an own series at another's known_time", "PUT /values", "",
			`{"updates":[{"series_key":"own","known_time":"ID",` + endOfRow,
			"2025-01-01T00:00:00Z", "2024-05-05T00:00:00Z"},
		{"upload to a series by id", "POST /upload", "", startOfRun + `{"series_id":"ID",` + endOfRow, seriesA, nobody},
		{"upload to a series by id and key", "POST /upload", "",
			startOfRun + `{"series_id":"ID","value_key":"load",` + endOfRow, seriesA, nobody},
		{"upload CSV to a series by id", "POST /upload", "?run_start_time=2025-01-01", csvRow, seriesA, nobody},
		{"withdraw a run", "POST /runs/{run_id}/withdraw", "", "", runA, nobody},
		{"withdraw a run and say why", "POST /runs/{run_id}/withdraw", "", `{"annotation":"ID"}`, runA, nobody},
		{"list the corrections of a series by id", "GET /corrections", "?series_id=ID", "", seriesA, nobody},
		{"list the corrections of a series by key", "GET /corrections", "?series_key=ID", "", "load", "liad"},
	}
	// These are answered, and must not show anything of tenant A's.
	probedReads := []struct{ name, route, query string }{
		{"values", "GET /values", ""},
		{"overlapping values in detail", "GET /values", "?mode=overlapping&detail=true"},
		{"values as CSV", "GET /values", "?format=csv"},
		{"sums of days", "GET /values", "?bucket=1d&agg=sum"},
		{"means of local months", "GET /values", "?bucket=P1M&tz=Asia/Tokyo&agg=mean&agg=last"},
		{"values known on their own day", "GET /values", "?days_ahead=0&time_of_day=23:59&tz=Asia/Tokyo"},
		{"values as of a time", "GET /values", "?as_of=2100-01-01"},
		{"values by a match", "GET /values", "?match=*"},
		{"values of a workflow", "GET /values", "?workflow_id=api-workflow&detail=true"},
		{"the latest values", "GET /values", "?latest=true&detail=true"},
		{"the latest values by a match", "GET /values", "?latest=true&detail=true&match=*"},
		{"values changed since a time", "GET /values", "?changed_since=2000-01-01"},
		{"series", "GET /list_timeseries", ""},
		{"corrections", "GET /corrections", ""},
		{"corrections of a pattern", "GET /corrections", "?match=*"},
		{"corrections by a user", "GET /corrections", "?changed_by=a@example.com"},
		{"series by a match", "GET /list_timeseries", "?match=*&stats=true"},
		{"runs", "GET /runs", ""},
		{"runs of a workflow", "GET /runs", "?workflow_id=api-workflow"},
		{"runs known since a time", "GET /runs", "?start_known=2000-01-01"},
	}

	// Every route must be tried by one of these tables.
	takeNoID := []string{"POST /series", "GET /list_timeseries"}
	isProbed := map[string]bool{}
	for _, c := range probes {
		isProbed[c.route] = true
	}
	isRead := map[string]bool{}
	for _, c := range probedReads {
		isRead[c.route] = true
	}
	exists := map[string]bool{}
	for _, rt := range (&server{}).routes() {
		exists[rt.pattern] = true
		if rt.access == open {
			continue
		}
		isTried := isProbed[rt.pattern] || slices.Contains(takeNoID, rt.pattern)
		if !isTried || rt.access == reads && !isRead[rt.pattern] {
			t.Errorf("%s is not tried with another tenant's ids: add how to this test", rt.pattern)
		}
	}

	for _, c := range probes {
		t.Run(c.name, func(t *testing.T) {
			if !exists[c.route] {
				t.Fatalf("there is no %s", c.route)
			}
			contentType := "application/json"
			if c.body == csvRow {
				contentType = "text/csv"
			}
			method, pattern, _ := strings.Cut(c.route, " ")
			answer := func(id string) string {
				t.Helper()
				path := strings.Replace(pattern, "{run_id}", id, 1)
				query := strings.ReplaceAll(c.query, "ID", url.QueryEscape(id))
				body := strings.ReplaceAll(c.body, "ID", id)
				text := s.must(t, 404, method, path+query, b, body, "Content-Type: "+contentType)
				return strings.ReplaceAll(text, id, "ID")
			}
			theirs, never := answer(c.theirs), answer(c.never)
			if theirs != never {
				t.Errorf("%q for another tenant's, %q for one that never existed", theirs, never)
			}
			if s.stored(t) != before {
				t.Error("a refused request stored something")
			}
		})
	}
	for _, c := range probedReads {
		t.Run(c.name, func(t *testing.T) {
			method, path, _ := strings.Cut(c.route, " ")
			text := s.must(t, 200, method, path+c.query, b, "")
			for _, secret := range []string{"load", runA, seriesA} {
				if strings.Contains(text, secret) {
					t.Errorf("%s%s shows another tenant's %s: %s", c.route, c.query, secret, text)
				}
			}
		})
	}

	// A series of the same name is another series, whatever its unit.
	for _, c := range []struct{ name, series string }{
		{"create a series of a name that another tenant uses", "load"},
		{"create a series of a name that nobody uses", "liad"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 200, "POST", "/series", b, `{"name":"`+c.series+`","unit":"kW"}`)
			if !strings.Contains(text, "created") || strings.Contains(text, seriesA) {
				t.Errorf("tenant B creates %q: %s", c.series, text)
			}
		})
	}
	// A run_id belongs to the tenant: the same run_id of another tenant neither clashes nor shows.
	for _, c := range []struct{ name, id string }{
		{"upload a run with a run_id that another tenant uses", runA},
		{"upload a run with a run_id that nobody uses", nobody},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, 200, "POST", "/upload", b, strings.Replace(emptyRun, `{`, `{"run_id":"`+c.id+`",`, 1))
		})
	}
	if got := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, ""); got != dataOfA {
		t.Errorf("tenant A's data changed from %s to %s", dataOfA, got)
	}
}

// What a client may choose, two tenants may have in common: a run_id, and the key of a series. Each acts on its own.
func TestTenantsWithOneRunIDActOnTheirOwn(t *testing.T) { // S16
	t.Parallel()
	s, a := mustTenant(t)
	b := s.mustUser(t, tenantB, "b@example.com")
	run := func(workflow, value string) string {
		return runWith(`"run_id":"`+nobody+`","workflow_id":"`+workflow+`",`, at("2025-01-01", value))
	}
	s.mustUpload(t, a, run("of a", "1"))
	ofA := func() string {
		return s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, "") + s.must(t, 200, "GET", "/runs", a, "") +
			mustQuery(t, s.db, `SELECT count(*) FROM values_table WHERE tenant_id = $1`, tenantA)
	}
	before := ofA()
	s.mustUpload(t, b, run("of b", "2"))
	s.must(t, 200, "PUT", "/values", b, update(`"run_id":"`+nobody+`","value":3`))
	for _, c := range []struct{ name, query, want string }{
		{"a match", "match=l*", "load 00=3"},
		{"a key with white space", "series_key=%20load", "load 00=3"},
		{"the own workflow", "workflow_id=of+b", "load 00=3"},
		{"the other's workflow", "workflow_id=of+a", ""},
		{"the run", "run_id=" + nobody, "load 00=3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := brief(t, s.must(t, 200, "GET", "/values?"+c.query, b, "")); got != c.want {
				t.Errorf("tenant B reads %s, want %s", got, c.want)
			}
		})
	}
	t.Run("the runs of the series", func(t *testing.T) {
		expectWords(t, s.must(t, 200, "GET", "/runs?series_key=load", b, ""), `"count":1,`, "of b")
	})
	s.must(t, 200, "POST", withdraw(nobody), b, "")
	if got := ofA(); got != before {
		t.Errorf("tenant A's data changed from %s to %s", before, got)
	}
}

func TestEveryKeyOfTenantTablesStartsWithTenantID(t *testing.T) { // S15
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	db := mustOpen(t, dsn)
	// These are the first columns of every primary, unique and foreign key, of what each foreign key refers to, and of
	// every unique index.
	const firstColumns = `
		(SELECT conrelid::regclass::text AS tab, conname::text AS name, conkey[1] AS col, conrelid AS rel
			FROM pg_constraint WHERE contype IN ('p', 'u', 'f')
		UNION ALL SELECT confrelid::regclass::text, conname, confkey[1], confrelid
			FROM pg_constraint WHERE contype = 'f'
		UNION ALL SELECT indrelid::regclass::text, indexrelid::regclass::text, indkey[0], indrelid
			FROM pg_index WHERE indisunique) k
		JOIN pg_attribute a ON a.attrelid = k.rel AND a.attnum = k.col
		WHERE tab IN ('runs_table', 'series_table', 'values_table', 'withdrawals_table')`
	bad := mustQuery(t, db, `SELECT string_agg(tab || ': ' || name, ', ') FROM `+firstColumns+`
		AND attname <> 'tenant_id'`)
	if bad != "" {
		t.Errorf("keys that do not start with tenant_id: %s", bad)
	}
	const ofKeys = `SELECT string_agg(pg_get_constraintdef(oid), ', ') FROM pg_constraint
		WHERE contype = 'f' AND conrelid = 'keys_table'::regclass`
	if got := mustQuery(t, db, ofKeys); got != "FOREIGN KEY (tenant_id, user_id) REFERENCES users_table(tenant_id, user_id)" {
		t.Errorf("a key is bound to its user by %s", got)
	}
	found, err := strconv.Atoi(mustQuery(t, db, `SELECT count(*) FROM `+firstColumns))
	if err != nil || found < 9 {
		t.Errorf("only %d keys were found: %v", found, err)
	}
}

// ---- Commands of the operator

func TestInterruptedCommandLeavesAllOrNothing(t *testing.T) { // S12
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	// createTables interrupts the command after limit.
	createTables := func(limit time.Duration) (code int) {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		env := func(name string) string {
			if name == "TIMEDB_DSN" {
				return dsn
			}
			return ""
		}
		var out bytes.Buffer
		return run(ctx, []string{"create", "tables", "-y", "--with-users"}, env, strings.NewReader(""), &out, &out)
	}
	var full string           // what the command leaves when nothing interrupts it
	var whole time.Duration   // how long it takes then, here and now
	var complete, nothing int // how many commands left all, and how many nothing
	for round := range 60 {
		undisturbed := round%20 == 0
		limit := time.Hour
		if !undisturbed {
			limit = time.Duration(rand.Int63n(int64(whole)*3/2 + 1))
		}
		begin := time.Now()
		code := createTables(limit)
		if undisturbed {
			whole = time.Since(begin)
		}
		// The command holds this lock until the database has ended its transaction, which may be after the command has
		// returned.
		mustExec(t, db, `SELECT pg_advisory_xact_lock(hashtextextended('timedb create tables', 0))`)
		got := relations(t, db, "public")
		if round == 0 {
			full = got
		}
		switch {
		case got == full:
			complete++
		case got == "" && code != 0:
			nothing++
		default:
			t.Fatalf("exit %d left %q, want %q, or nothing and another exit code than 0", code, got, full)
		}
		mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	}
	if complete < 4 || nothing < 2 { // three were not interrupted
		t.Errorf("the interruptions came all too early or all too late: %d left all, %d nothing", complete, nothing)
	}
}

// ---- What can be read off the source

// mustSources are the names of the program's source files, without the tests.
func mustSources(t *testing.T) (files []string) {
	t.Helper()
	all, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		if !strings.HasSuffix(file, "_test.go") {
			files = append(files, file)
		}
	}
	return files
}

// sourceSet holds the positions of what mustParseSource has parsed.
var sourceSet = token.NewFileSet()

func mustParseSource(t *testing.T, file string) *ast.File {
	t.Helper()
	tree, err := parser.ParseFile(sourceSet, file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// placeOf is where a part of the source stands, as file:line.
func placeOf(n ast.Node) string {
	at := sourceSet.Position(n.Pos())
	return fmt.Sprintf("%s:%d", at.Filename, at.Line)
}

// linesOf counts the lines of a part of the source, without a comment above it.
func linesOf(n ast.Node) int {
	return sourceSet.Position(n.End()).Line - sourceSet.Position(n.Pos()).Line + 1
}

// inspect calls fn for each node of a source file.
func inspect(t *testing.T, file string, fn func(ast.Node)) {
	t.Helper()
	ast.Inspect(mustParseSource(t, file), func(n ast.Node) bool {
		fn(n)
		return true
	})
}

// inspectAll calls fn for each node of each source file.
func inspectAll(t *testing.T, fn func(file string, n ast.Node)) {
	t.Helper()
	for _, file := range mustSources(t) {
		inspect(t, file, func(n ast.Node) { fn(file, n) })
	}
}

// isName tells whether an expression is this name, alone.
func isName(expr ast.Expr, name string) bool {
	id, ok := expr.(*ast.Ident)
	return ok && id.Name == name
}

// calledName is the name of the function or method that a call names, without its package or receiver.
func calledName(call *ast.CallExpr) string {
	switch fn := call.Fun.(type) {
	case *ast.SelectorExpr:
		return fn.Sel.Name
	case *ast.Ident:
		return fn.Name
	}
	return ""
}

func TestSQLOnTenantDataNamesTheTenant(t *testing.T) { // S14
	touchesTenantData := regexp.MustCompile(
		`(?i)\b(FROM|JOIN|INTO|UPDATE|ONLY)\s+(runs_table|series_table|values_table|value_blocks|withdrawals_table|current_values)\b`)
	namesTenant := regexp.MustCompile(`tenant_id = \$1|INTO \w+ \(tenant_id,`)
	statements, functions := 0, 0
	// check looks at a text: each table that it names must come with a tenant.
	check := func(where, text string, hasCaller bool) {
		tables := len(touchesTenantData.FindAllString(text, -1))
		if tables == 0 {
			return
		}
		statements++
		if !hasCaller {
			t.Errorf("%s touches tenant data without a Caller: %s", where, text)
		}
		if tenants := len(namesTenant.FindAllString(text, -1)); tenants < tables {
			t.Errorf("%s: SQL with %d tables and %d tenants: %s", where, tables, tenants, text)
		}
	}
	tree := mustParseSource(t, "store.go")
	// checkLiterals looks at each text under a node.
	checkLiterals := func(where string, node ast.Node, hasCaller bool) {
		ast.Inspect(node, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				check(where, lit.Value, hasCaller)
			}
			return true
		})
	}
	for name, text := range textsOf(tree) {
		check(name, text, true)
	}
	for _, decl := range tree.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok {
			checkLiterals("a constant", decl, true) // some function runs it, and that is checked as well
			continue
		}
		if fn.Name.Name == "Everything" { // counts what delete tables takes, of all tenants
			continue
		}
		hasCaller := slices.ContainsFunc(fn.Type.Params.List, func(f *ast.Field) bool {
			return isName(f.Type, "Caller")
		})
		if hasCaller {
			functions++
		}
		checkLiterals(fn.Name.Name, fn, hasCaller)
	}
	if statements < 5 || functions < 5 {
		t.Errorf("only %d statements and %d functions with a Caller were found: "+
			"does this test still look in the right place?", statements, functions)
	}
}

// SQL is never assembled. Where it is run, it is a literal, a constant of the package, or the parameter named query of a
// function that hands it on; whoever calls that function passes one of these. A function named statement puts constants
// together. What create and delete tables run comes from schema.sql.
func TestSQLIsNotAssembled(t *testing.T) { // S18
	// The position of the SQL among the arguments of what runs it.
	position := map[string]int{
		"QueryContext": 1, "ExecContext": 1, "QueryRowContext": 1, "PrepareContext": 1,
		"prepare": 2, "exec": 1, "execAll": 1, "eachRow": 2, "oneRow": 2, "change": 2, "changeOne": 3, "lose": 3,
	}
	found := 0
	for _, file := range mustSources(t) {
		tree := mustParseSource(t, file)
		constants := constantsOf(tree)
		for _, decl := range tree.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok || fn.Name.Name == "execAll" { // which cuts what it is given
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, isCall := n.(*ast.CallExpr)
				if !isCall {
					return true
				}
				at, runsSQL := position[calledName(call)]
				if !runsSQL || len(call.Args) <= at {
					return true
				}
				if call.Ellipsis.IsValid() {
					return true // a prepared statement, of which these are the arguments
				}
				found++
				if !isFixedSQL(call.Args[at], constants, takesQuery(fn)) && !isOfSchema(call.Args[at]) {
					t.Errorf("%s: %s runs SQL that is no constant", file, fn.Name.Name)
				}
				return true
			})
			if fn.Name.Name == "statement" {
				for _, part := range partsOfStatement(fn) {
					if !slices.Contains(constants, part) {
						t.Errorf("%s: statement is made of %s, which is no constant", file, part)
					}
				}
			}
		}
	}
	if found < 25 {
		t.Errorf("only %d places were found: does this test still look in the right place?", found)
	}
}

// partsOfStatement are the names, other than those of its variables, of which statement makes its variables and its
// answers. What is neither a name nor a sum of names is a part called "an expression".
func partsOfStatement(fn *ast.FuncDecl) (parts []string) {
	variables := map[string]bool{}
	var add func(ast.Expr)
	add = func(x ast.Expr) {
		switch x := x.(type) {
		case *ast.Ident:
			if !variables[x.Name] {
				parts = append(parts, x.Name)
			}
		case *ast.BinaryExpr:
			add(x.X)
			add(x.Y)
		default:
			parts = append(parts, "an expression")
		}
	}
	ast.Inspect(fn, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			add(n.Rhs[0])
			variables[n.Lhs[0].(*ast.Ident).Name] = true
		case *ast.ReturnStmt:
			add(n.Results[0])
		}
		return true
	})
	return parts
}

// textsOf are the constant texts that a file declares at its top level, each as a whole.
func textsOf(tree *ast.File) map[string]string {
	declared := map[string]ast.Expr{}
	for _, spec := range constantSpecs(tree) {
		for i, value := range spec.Values {
			declared[spec.Names[i].Name] = value
		}
	}
	var whole func(ast.Expr) string
	whole = func(x ast.Expr) string {
		switch x := x.(type) {
		case *ast.BasicLit:
			return strings.Trim(x.Value, "`\"")
		case *ast.BinaryExpr:
			return whole(x.X) + whole(x.Y)
		case *ast.Ident:
			return whole(declared[x.Name])
		}
		return ""
	}
	texts := map[string]string{}
	for name, x := range declared {
		texts[name] = whole(x)
	}
	return texts
}

// constantSpecs are the declarations of constants at the top level of a file.
func constantSpecs(tree *ast.File) (specs []*ast.ValueSpec) {
	for _, decl := range tree.Decls {
		block, ok := decl.(*ast.GenDecl)
		if !ok || block.Tok != token.CONST {
			continue
		}
		for _, spec := range block.Specs {
			specs = append(specs, spec.(*ast.ValueSpec))
		}
	}
	return specs
}

// constantsOf are the constants that a file declares at its top level.
func constantsOf(tree *ast.File) []string {
	var names []string
	for _, spec := range constantSpecs(tree) {
		for _, name := range spec.Names {
			names = append(names, name.Name)
		}
	}
	return names
}

// takesQuery tells whether a function has a parameter named query, which it hands on.
func takesQuery(fn *ast.FuncDecl) bool {
	return slices.ContainsFunc(fn.Type.Params.List, func(f *ast.Field) bool {
		return slices.ContainsFunc(f.Names, func(name *ast.Ident) bool { return name.Name == "query" })
	})
}

// isFixedSQL tells whether an expression is a literal, a constant, what statement chose, or a query that is handed on.
func isFixedSQL(x ast.Expr, constants []string, handsQueryOn bool) bool {
	switch x := x.(type) {
	case *ast.BasicLit:
		return true
	case *ast.Ident:
		return slices.Contains(constants, x.Name) || x.Name == "query" && handsQueryOn
	case *ast.CallExpr:
		return calledName(x) == "statement"
	}
	return false
}

// isOfSchema tells whether an expression is a text made of sections of schema.sql.
func isOfSchema(x ast.Expr) bool {
	call, ok := x.(*ast.CallExpr)
	return ok && (calledName(call) == "schemaSections" || calledName(call) == "tableSections")
}

func TestCallersExitsAndSQLAreWhereTheyBelong(t *testing.T) {
	t.Run("only auth.go makes a Caller", func(t *testing.T) {
		inspectAll(t, func(file string, n ast.Node) {
			literal, ok := n.(*ast.CompositeLit)
			if ok && isName(literal.Type, "Caller") && file != "auth.go" {
				t.Errorf("%s makes a Caller", file)
			}
		})
	})
	t.Run("only main.go exits", func(t *testing.T) {
		inspectAll(t, func(file string, n ast.Node) {
			selector, ok := n.(*ast.SelectorExpr)
			if ok && isName(selector.X, "os") && selector.Sel.Name == "Exit" && file != "main.go" {
				t.Errorf("%s calls os.Exit", file)
			}
		})
	})
	t.Run("only a command is an operator", func(t *testing.T) { // S14
		inspectAll(t, func(file string, n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			if ok && isName(call.Fun, "operatorOf") && file != "cli.go" {
				t.Errorf("%s acts as an operator", file)
			}
		})
	})
	t.Run("only cli.go counts over all tenants", func(t *testing.T) { // S14
		inspectAll(t, func(file string, n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			if ok && calledName(call) == "Everything" && file != "cli.go" {
				t.Errorf("%s counts over all tenants", file)
			}
		})
	})
	t.Run("only cli.go has keys made", func(t *testing.T) { // S5
		inspectAll(t, func(file string, n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			if ok && isName(call.Fun, "newKey") && file != "cli.go" {
				t.Errorf("%s makes keys", file)
			}
		})
	})
	t.Run("digests are compared in constant time", func(t *testing.T) { // S7
		const inConstantTime = "subtle.ConstantTimeCompare(digest[:], k.digest)"
		places := 0
		inspectAll(t, func(_ string, n ast.Node) {
			var compared []ast.Expr
			switch n := n.(type) {
			case *ast.CallExpr:
				if types.ExprString(n) == inConstantTime {
					places++
				}
				if name := calledName(n); name == "Equal" || name == "Compare" {
					compared = n.Args
				}
			case *ast.BinaryExpr:
				compared = []ast.Expr{n.X, n.Y}
			}
			for _, x := range compared {
				text := types.ExprString(x)
				if text != inConstantTime && strings.Contains(text, "digest") {
					t.Errorf("%s compares %s", placeOf(n), text)
				}
			}
		})
		if places != 1 {
			t.Errorf("they are in %d places, want 1", places)
		}
	})
	t.Run("the server has every limit", func(t *testing.T) { // S20
		isSet := map[string]bool{}
		inspect(t, "cli.go", func(n ast.Node) {
			member, ok := n.(*ast.KeyValueExpr)
			if !ok {
				return
			}
			if id, ok := member.Key.(*ast.Ident); ok {
				isSet[id.Name] = true
			}
		})
		limits := []string{"ReadHeaderTimeout", "ReadTimeout", "WriteTimeout", "IdleTimeout",
			"MaxHeaderBytes", "ConnState", "HTTP2"}
		for _, limit := range limits {
			if !isSet[limit] {
				t.Errorf("the server has no %s", limit)
			}
		}
		isBounded := false // the wait for running requests (S30)
		inspect(t, "cli.go", func(n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			isBounded = isBounded || ok && calledName(call) == "WithTimeout" && isName(call.Args[1], "drainTimeout")
		})
		if !isBounded {
			t.Error("to stop may take for ever")
		}
	})
	t.Run("random bytes are auth.go's, and crypto/rand's", func(t *testing.T) { // S5
		inspectAll(t, func(file string, n ast.Node) {
			spec, ok := n.(*ast.ImportSpec)
			if !ok || !strings.Contains(spec.Path.Value, "/rand") { // math/rand/v2 too
				return
			}
			if spec.Path.Value != `"crypto/rand"` || file != "auth.go" {
				t.Errorf("%s imports %s", file, spec.Path.Value)
			}
		})
	})
}

// ---- How plain the source is

// The limits of the program's source. They keep it readable in one sitting: tokens bound how much
// there is to read, and the figures for each line keep anybody from meeting that by dense code.
const (
	// The aim is 24,000 tokens and 4,200 lines: what is over it has to be earned yet, or to go.
	maxTokens         = 39_850
	maxSourceLines    = 6_990
	maxAuthLines      = 320
	maxSchemaLines    = 260
	maxFunctionLines  = 60
	maxColumns        = 100
	maxTokensAverage  = 7.3 // of a line of code
	maxTokens95       = 22  // likewise; 95 of 100 lines have no more
	maxComplexity     = 14
	maxAuthComplexity = 10
)

// codeLine is a line of a source file that holds at least one token.
type codeLine struct {
	place  string // file:line
	tokens int
}

// figures is what can be counted in the program's source.
type figures struct {
	tokens, lines int
	fileTokens    map[string]int
	fileLines     map[string]int
	code          []codeLine
	functions     int
	// Places of what is over its limit, or should be a statement.
	wide, long, tangled, authTangled, indexed, eager []string
}

// mustMeasure counts in all source files.
func mustMeasure(t *testing.T) *figures {
	t.Helper()
	f := &figures{fileTokens: map[string]int{}, fileLines: map[string]int{}}
	for _, file := range mustSources(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		f.countLines(file, string(text))
		f.countTokens(file, text)
		inspect(t, file, f.judge)
	}
	return f
}

func (f *figures) countLines(file, text string) {
	for line := range strings.Lines(text) {
		f.lines++
		f.fileLines[file]++
		shown := strings.ReplaceAll(strings.TrimSuffix(line, "\n"), "\t", "    ")
		if columns := utf8.RuneCountInString(shown); columns > maxColumns {
			place := fmt.Sprintf("%s:%d: %d columns", file, f.fileLines[file], columns)
			f.wide = append(f.wide, place)
		}
	}
}

// countTokens counts as go/scanner does, without comments and the semicolons that it inserts.
func (f *figures) countTokens(file string, text []byte) {
	source := token.NewFileSet().AddFile(file, -1, len(text))
	var s scanner.Scanner
	s.Init(source, text, nil, 0)
	last := 0
	for {
		pos, tok, literal := s.Scan()
		if tok == token.EOF {
			return
		}
		if tok == token.SEMICOLON && literal == "\n" {
			continue
		}
		if line := source.Line(pos); line != last {
			last = line
			f.code = append(f.code, codeLine{place: fmt.Sprintf("%s:%d", file, line)})
		}
		f.code[len(f.code)-1].tokens++
		f.tokens++
		f.fileTokens[file]++
	}
}

// judge measures n if it is a function, and looks for choices that hide in an expression.
func (f *figures) judge(n ast.Node) {
	switch n := n.(type) {
	case *ast.FuncDecl:
		f.functions++
		where := fmt.Sprintf("%s: %s", placeOf(n), declaredName(n))
		if lines := linesOf(n); lines > maxFunctionLines {
			f.long = append(f.long, fmt.Sprintf("%s has %d lines", where, lines))
		}
		branches := complexity(n)
		tangled := fmt.Sprintf("%s has complexity %d", where, branches)
		if branches > maxComplexity {
			f.tangled = append(f.tangled, tangled)
		}
		if branches > maxAuthComplexity && strings.HasPrefix(where, "auth.go:") {
			f.authTangled = append(f.authTangled, tangled)
		}
	case *ast.IndexExpr:
		if _, isLiteral := ast.Unparen(n.X).(*ast.CompositeLit); isLiteral {
			f.indexed = append(f.indexed, placeOf(n))
		}
	case *ast.CallExpr:
		of, ok := n.Fun.(*ast.SelectorExpr)
		isOr := ok && isName(of.X, "cmp") && of.Sel.Name == "Or"
		if isOr && slices.ContainsFunc(n.Args, hasCall) {
			f.eager = append(f.eager, placeOf(n))
		}
	}
}

// hasCall tells whether x makes a call that may cost something, fail or have an effect.
// Comparisons are what cmp.Or is for; a conversion to string and len cost nothing.
func hasCall(x ast.Expr) bool {
	found := false
	ast.Inspect(x, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			name := calledName(call)
			isComparison := strings.HasPrefix(strings.ToLower(name), "compare")
			found = found || !isComparison && name != "string" && name != "len"
		}
		return true
	})
	return found
}

// complexity is McCabe's number: 1, and 1 for each branch, loop, case, && and ||.
func complexity(fn *ast.FuncDecl) int {
	count := 1
	ast.Inspect(fn, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.IfStmt, *ast.ForStmt, *ast.RangeStmt:
			count++
		case *ast.CaseClause:
			if n.List != nil { // which default has not
				count++
			}
		case *ast.CommClause:
			if n.Comm != nil {
				count++
			}
		case *ast.BinaryExpr:
			if n.Op == token.LAND || n.Op == token.LOR {
				count++
			}
		}
		return true
	})
	return count
}

// declaredName is the name of a function, or of a method after its type: server.serve.
func declaredName(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	of := fn.Recv.List[0].Type
	if pointer, ok := of.(*ast.StarExpr); ok {
		of = pointer.X
	}
	if generic, ok := of.(*ast.IndexExpr); ok {
		of = generic.X
	}
	return of.(*ast.Ident).Name + "." + fn.Name.Name
}

// densest returns the places of the n lines with the most tokens.
func (f *figures) densest(n int) string {
	lines := slices.SortedFunc(slices.Values(f.code), func(a, b codeLine) int {
		return b.tokens - a.tokens
	})
	var text strings.Builder
	for _, line := range lines[:min(n, len(lines))] {
		fmt.Fprintf(&text, "\n\t%s: %d tokens", line.place, line.tokens)
	}
	return text.String()
}

func TestSourceIsPlain(t *testing.T) {
	f := mustMeasure(t)
	if len(f.code) == 0 || f.functions == 0 {
		t.Fatal("no source was found: does this test still look in the right place?")
	}
	schema, err := os.ReadFile("schema.sql")
	if err != nil {
		t.Fatal(err)
	}
	perLine := make([]int, len(f.code))
	for i, line := range f.code {
		perLine[i] = line.tokens
	}
	slices.Sort(perLine)
	sums := []struct {
		name       string
		got, limit float64
		where      string
	}{
		{"tokens", float64(f.tokens), maxTokens, fmt.Sprint(f.fileTokens)},
		{"lines", float64(f.lines), maxSourceLines, fmt.Sprint(f.fileLines)},
		{"lines of auth.go", float64(f.fileLines["auth.go"]), maxAuthLines, "auth.go"},
		{"lines of schema.sql", float64(bytes.Count(schema, []byte("\n"))), maxSchemaLines,
			"schema.sql"},
		{"tokens of a line, average", float64(f.tokens) / float64(len(f.code)), maxTokensAverage,
			f.densest(20)},
		{"tokens of a line, 95th percentile", float64(perLine[len(perLine)*95/100]), maxTokens95,
			f.densest(20)},
	}
	for _, sum := range sums {
		t.Run(sum.name, func(t *testing.T) {
			if sum.got > sum.limit {
				t.Errorf("%.6g, over %g: %s", sum.got, sum.limit, sum.where)
			}
		})
	}
	places := []struct {
		name  string
		found []string
	}{
		{"no line is wider than 100 columns", f.wide},
		{"no function is longer than 60 lines", f.long},
		{"no function has more than 14 ways", f.tangled},
		{"no function of auth.go has more than 10 ways", f.authTangled},
		{"no literal is indexed in place of an if", f.indexed},
		{"cmp.Or makes no call", f.eager}, // it would make all, whatever comes before them
	}
	for _, place := range places {
		t.Run(place.name, func(t *testing.T) {
			for _, where := range place.found {
				t.Error(where)
			}
		})
	}
}

// ---- Which file knows which

// emptyPackages imports every package as an empty one. What the program's own files declare, and
// where they name it, can be told without the others.
type emptyPackages struct{}

func (emptyPackages) Import(importPath string) (*types.Package, error) {
	p := types.NewPackage(importPath, path.Base(importPath))
	p.MarkComplete()
	return p, nil
}

// foreignName is a name that one file uses and another one declares at its top level.
type foreignName struct {
	from, to string // files
	name     string
}

// mustForeignNames finds them, each with a place where it is used.
func mustForeignNames(t *testing.T) map[foreignName]string {
	t.Helper()
	var trees []*ast.File
	for _, file := range mustSources(t) {
		trees = append(trees, mustParseSource(t, file))
	}
	info := types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{
		Importer: emptyPackages{},
		Error:    func(error) {}, // what the empty packages lack is of no interest here
	}
	program, _ := config.Check("timedb", sourceSet, trees, &info)
	found := map[foreignName]string{}
	for used, object := range info.Uses {
		if object.Parent() != program.Scope() {
			continue // a local name, a member, or a name of another package
		}
		from, to := sourceSet.Position(used.Pos()), sourceSet.Position(object.Pos())
		found[foreignName{from.Filename, to.Filename, object.Name()}] = placeOf(used)
	}
	return found
}

// The files know each other in one direction: main, cli, server, store, auth. Each keeps what is
// its own matter alone.
func TestArrowsPointOneWay(t *testing.T) {
	t.Run("names", testNamesPointOneWay)
	t.Run("imports", testImportsAreOfOneFile)
	t.Run("statuses and SQL", testStatusesAndSQLAreOfOneFile)
	t.Run("a Caller comes first after ctx", func(t *testing.T) {
		found := 0
		for _, decl := range mustParseSource(t, "store.go").Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			for i, parameter := range fn.Type.Params.List {
				if !isName(parameter.Type, "Caller") {
					continue
				}
				found++
				if i > 1 || i == 1 && !isName(fn.Type.Params.List[0].Names[0], "ctx") {
					t.Errorf("store.go: %s takes its Caller later", declaredName(fn))
				}
			}
		}
		if found < 5 {
			t.Errorf("only %d functions take a Caller: "+
				"does this test still look in the right place?", found)
		}
	})
}

func testNamesPointOneWay(t *testing.T) {
	cases := []struct {
		from, to string
		may      []string
	}{
		{"auth.go", "store.go", nil},
		{"auth.go", "server.go", nil},
		{"auth.go", "cli.go", nil},
		{"auth.go", "main.go", nil},
		{"store.go", "auth.go", []string{"Caller", "keyRecord"}},
		{"store.go", "server.go", nil},
		{"store.go", "cli.go", nil},
		{"store.go", "main.go", nil},
		{"server.go", "cli.go", []string{"release"}},
		{"server.go", "main.go", nil},
		{"cli.go", "main.go", nil},
		{"main.go", "auth.go", nil},
		{"main.go", "store.go", nil},
		{"main.go", "server.go", nil},
		{"main.go", "cli.go", []string{"run"}},
	}
	names := mustForeignNames(t)
	if len(names) < 100 {
		t.Fatalf("only %d names were found: "+
			"does this test still look in the right place?", len(names))
	}
	for _, c := range cases {
		t.Run(c.from+" names of "+c.to, func(t *testing.T) {
			for used, place := range names {
				if used.from == c.from && used.to == c.to && !slices.Contains(c.may, used.name) {
					t.Errorf("%s names %s, which %s declares", place, used.name, c.to)
				}
			}
		})
	}
}

func testImportsAreOfOneFile(t *testing.T) {
	cases := []struct {
		name  string // of a package; those below it are meant too
		files []string
	}{
		{"database/sql", []string{"store.go"}},
		{"github.com/lib/pq", []string{"store.go"}},
		{"net/http", []string{"auth.go", "cli.go", "server.go"}},
		{"flag", []string{"cli.go"}},
		{"os/signal", []string{"main.go"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			found := false
			inspectAll(t, func(file string, n ast.Node) {
				spec, ok := n.(*ast.ImportSpec)
				if !ok {
					return
				}
				imported := strings.Trim(spec.Path.Value, `"`)
				if imported != c.name && !strings.HasPrefix(imported, c.name+"/") {
					return
				}
				found = true
				if !slices.Contains(c.files, file) {
					t.Errorf("%s imports %s", file, imported)
				}
			})
			if !found {
				t.Error("no file imports it: is it still the right name?")
			}
		})
	}
}

func testStatusesAndSQLAreOfOneFile(t *testing.T) {
	isStatus := regexp.MustCompile(`^[45]\d\d$`)
	isSQL := regexp.MustCompile(`\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|DROP)\s`)
	runsSQL := regexp.MustCompile(
		`^((QueryRow|Exec|Prepare)(Context)?|QueryContext|Begin|BeginTx)$`)
	cases := []struct {
		name, file string
		mayBeNamed bool // as a constant: that is a limit
		isOne      func(n ast.Node) bool
	}{
		{"http.StatusXxx", "server.go", false, func(n ast.Node) bool {
			of, ok := n.(*ast.SelectorExpr)
			return ok && isName(of.X, "http") && strings.HasPrefix(of.Sel.Name, "Status")
		}},
		{"numbers of statuses", "server.go", true, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			return ok && literal.Kind == token.INT && isStatus.MatchString(literal.Value)
		}},
		{"texts of SQL", "store.go", false, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			return ok && literal.Kind == token.STRING && isSQL.MatchString(literal.Value)
		}},
		{"calls that run SQL", "store.go", false, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			return ok && runsSQL.MatchString(calledName(call))
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			found := 0
			for _, file := range mustSources(t) {
				ast.Inspect(mustParseSource(t, file), func(n ast.Node) bool {
					block, ok := n.(*ast.GenDecl)
					if ok && block.Tok == token.CONST && c.mayBeNamed {
						return false
					}
					if !c.isOne(n) {
						return true
					}
					found++
					if file != c.file {
						t.Errorf("%s: this belongs into %s", placeOf(n), c.file)
					}
					return true
				})
			}
			if found == 0 {
				t.Errorf("%s has none: does this test still look in the right place?", c.file)
			}
		})
	}
}

// ---- What docs/SECURITY.md says

// maxAuditLines bounds what a security reviewer must read: one sitting.
const maxAuditLines = 650

// auditRow is a line of the table of docs/SECURITY.md that lists what to read.
type auditRow struct {
	file  string
	names []string // of declarations; none: the whole file
	lines int
}

// mustAuditPath reads that table, and the sum below it.
func mustAuditPath(t *testing.T) (rows []auditRow, together int) {
	t.Helper()
	text, err := os.ReadFile("docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## What to read, in order\n")
	section, _, _ = strings.Cut(section, "\n## ")
	row := regexp.MustCompile(
		"(?m)^\\| (\\d+) \\| `([a-z]+\\.go)` \\| (.*?) \\| .* \\| (\\d+) \\|$")
	name := regexp.MustCompile("`([A-Za-z.]+)`")
	for _, cells := range row.FindAllStringSubmatch(section, -1) {
		r := auditRow{file: cells[2]}
		for _, quoted := range name.FindAllStringSubmatch(cells[3], -1) {
			r.names = append(r.names, quoted[1])
		}
		if r.names == nil && cells[3] != "the whole file" {
			t.Errorf("row %s names nothing to read: %s", cells[1], cells[3])
		}
		r.lines, _ = strconv.Atoi(cells[4])
		rows = append(rows, r)
		if cells[1] != strconv.Itoa(len(rows)) {
			t.Errorf("row %d of the table is numbered %s, or the one before it cannot be read",
				len(rows), cells[1])
		}
	}
	sum := regexp.MustCompile(`(?m)^\| \| \| \| together \| (\d+) \|$`).FindStringSubmatch(section)
	if rows == nil || sum == nil {
		t.Fatal("docs/SECURITY.md has no table of what to read, or no sum below it")
	}
	together, _ = strconv.Atoi(sum[1])
	return rows, together
}

// declaredLines counts the lines of each top-level declaration of a file, with the comment above
// it.
func declaredLines(t *testing.T, file string) map[string]int {
	t.Helper()
	lines := map[string]int{}
	count := func(name string, n ast.Node, comment *ast.CommentGroup) {
		lines[name] = linesOf(n)
		if comment != nil {
			lines[name] += linesOf(comment)
		}
	}
	for _, decl := range mustParseSource(t, file).Decls {
		block, ok := decl.(*ast.GenDecl)
		if !ok {
			fn := decl.(*ast.FuncDecl)
			count(declaredName(fn), fn, fn.Doc)
			continue
		}
		isAlone := !block.Lparen.IsValid()
		for _, spec := range block.Specs {
			switch spec := spec.(type) {
			case *ast.TypeSpec:
				count(spec.Name.Name, spec, spec.Doc)
				if isAlone {
					count(spec.Name.Name, block, block.Doc)
				}
			case *ast.ValueSpec:
				for _, name := range spec.Names {
					count(name.Name, spec, spec.Doc)
					if isAlone {
						count(name.Name, block, block.Doc)
					}
				}
			}
		}
	}
	return lines
}

// What a security reviewer must read is listed in docs/SECURITY.md, and fits one sitting.
func TestAuditPathIsListedAndShort(t *testing.T) {
	rows, together := mustAuditPath(t)
	listed := map[string]bool{} // file:name
	for i, row := range rows {
		t.Run(fmt.Sprintf("row %d, %s", i+1, row.file), func(t *testing.T) {
			lines := 0
			declared := declaredLines(t, row.file)
			for _, name := range row.names {
				if declared[name] == 0 {
					t.Errorf("%s declares no %s", row.file, name)
				}
				if listed[row.file+":"+name] {
					t.Errorf("%s: %s is listed twice", row.file, name)
				}
				listed[row.file+":"+name] = true
				lines += declared[name]
			}
			if row.names == nil {
				text, err := os.ReadFile(row.file)
				if err != nil {
					t.Fatal(err)
				}
				lines = bytes.Count(text, []byte("\n"))
			}
			if lines != row.lines {
				t.Errorf("the table says %d lines; there are %d", row.lines, lines)
			}
		})
	}
	t.Run("together", func(t *testing.T) {
		sum := 0
		for _, row := range rows {
			sum += row.lines
		}
		if sum != together {
			t.Errorf("the table says %d lines; its rows have %d", together, sum)
		}
		if sum > maxAuditLines {
			t.Errorf("there are %d lines to read, over %d", sum, maxAuditLines)
		}
	})
}

// docs/SECURITY.md names for each item the functions that enforce it and the tests. They must exist.
func TestSecurityDocumentNamesWhatThereIs(t *testing.T) { // S32
	text, err := os.ReadFile("docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	declaration := regexp.MustCompile(`(?m)^(?:func (?:\([^)]*\) )?|\t|var |const |type )([A-Za-z0-9]+)`)
	declared := map[string]bool{} // file:name
	isTest := map[string]bool{}   // names that a test file declares
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range declaration.FindAllStringSubmatch(string(source), -1) {
			name := found[1]
			declared[file+":"+name] = true
			if strings.HasSuffix(file, "_test.go") {
				isTest[name] = true
			}
		}
	}
	scanned := regexp.MustCompile("(?m)^`(tdb_.*)`\\.").FindSubmatch(text)
	if scanned == nil {
		t.Fatal("there is no pattern of a key for secret scanners")
	}
	key, _, _ := newKey()
	if found := regexp.MustCompile(string(scanned[1])).FindString("x=" + key + ";"); found != key {
		t.Errorf("the pattern for secret scanners finds %d of %d characters of a key", len(found), len(key))
	}
	testName := regexp.MustCompile("Test[A-Za-z0-9]+")
	placeName := regexp.MustCompile("`([a-z_]+\\.go):([A-Za-z0-9]+)`")
	for i := 1; i <= 41; i++ {
		t.Run(fmt.Sprintf("S%d", i), func(t *testing.T) {
			row := regexp.MustCompile(fmt.Sprintf(`(?m)^\| S%d \|.*$`, i)).FindString(string(text))
			tests := testName.FindAllString(row, -1)
			places := placeName.FindAllStringSubmatch(row, -1)
			isElsewhere := strings.Contains(row, "schema.sql") || strings.Contains(row, "docs/")
			if len(tests) == 0 || len(places) == 0 && !isElsewhere {
				t.Errorf("%q names no place or no test", row)
			}
			for _, name := range tests {
				if !isTest[name] {
					t.Errorf("there is no %s", name)
				}
			}
			for _, place := range places {
				file, name := place[1], place[2]
				if !declared[file+":"+name] {
					t.Errorf("there is no %s in %s", name, file)
				}
			}
		})
	}
}
