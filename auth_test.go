package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestEveryKeyIsAnother(t *testing.T) { // S5
	seen := map[string]bool{}
	for range 10_000 {
		key, id, digest := newKey()
		sum := sha256.Sum256([]byte(key))
		secret := key[len("tdb_")+8+1:][:43]
		if !wellFormedKey(key) || !strings.HasPrefix(key, "tdb_"+id+"_") || !bytes.Equal(digest, sum[:]) || seen[secret] || strings.Contains(secret, "AAAAAAAA") {
			t.Fatalf("newKey returns %q, %q, %x", key, id, digest)
		}
		seen[secret] = true
	}
}

func TestSweepFindsSecrets(t *testing.T) { // S6: or finding none would mean nothing
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	key, _, _ := newKey()
	password, _ := mustParse(t, dsn).User.Password()
	if password == "" {
		password = appRole.password
	}
	for secret, want := range map[string]string{key: "a key", password: "a password", appRole.password: "a password"} {
		mustExec(t, db, `CREATE TABLE leak AS SELECT 'x' || $1::text || 'y' AS held`, secret)
		if found := secretsIn(t, dsn); found != want {
			t.Errorf("in a database that holds %s the sweep finds %q", want, found)
		}
		mustExec(t, db, `DROP TABLE leak`)
	}
}

func TestEveryRouteNeedsAKey(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	for _, path := range []string{"/upload", "/values", "/series", "/list_timeseries", "/runs", "/", "/healthz", "/docs", "/openapi.json",
		"/nope", "/values/", "/docs/", "/values/x", "//values", "/./values", "/upload?x=%zz", "/users", "/debug/pprof/", "/.git/config"} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "NONSENSE"} {
			isOpen := slices.Contains([]string{"/", "/healthz", "/docs", "/openapi.json"}, path) && (method == "GET" || method == "HEAD")
			resp, body, err := s.do(method, path, "", "")
			if err != nil {
				t.Fatal(err)
			}
			if isOpen && resp.StatusCode != 200 {
				t.Errorf("%s %s: status %d, want 200", method, path, resp.StatusCode)
			}
			if !isOpen && (resp.StatusCode != 401 || method != "HEAD" && body != noKey ||
				resp.Header.Get("WWW-Authenticate") != "ApiKey") {
				t.Errorf("%s %s without a key: status %d, %v %q", method, path, resp.StatusCode, resp.Header, body)
			}
			for name := range resp.Header {
				if strings.HasPrefix(name, "Access-Control-") { // S24
					t.Errorf("%s %s: CORS header %s", method, path, name)
				}
			}
		}
	}
	for _, target := range []string{"OPTIONS *", "GET *", "CONNECT 127.0.0.1:1", "GET http://other.example/values"} {
		if line := s.mustRaw(t, target+" HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.Contains(line, " 40") {
			t.Errorf("%s: %q, want a refusal", target, line)
		}
	}
	if line := s.mustRaw(t, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"); !strings.Contains(line, " 401 ") {
		t.Errorf("OPTIONS *: %q, want 401", line)
	}
}

func TestMalformedKeysAreRefusedWithoutALookup(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	mustExec(t, s.db, "REVOKE ALL ON users_table FROM "+appRole.name) // from now on a lookup would be 503
	s.must(t, 503, "GET", "/list_timeseries", key, "")
	for _, c := range []struct{ body, path, header string }{
		{noKey, "/list_timeseries", "X-Other: x"}, {noKey, "/list_timeseries", "X-API-Key: "},
		{noKey, "/list_timeseries?api_key=" + key + "&X-API-Key=" + key, "X-Other: x"},
		{noKey, "/list_timeseries", "Authorization: ApiKey " + key}, {noKey, "/list_timeseries", "Cookie: X-API-Key=" + key},
		{badKey, "/list_timeseries", "X-API-Key: x"}, {badKey, "/list_timeseries", "X-API-Key: " + key + key},
		{badKey, "/list_timeseries", "X-API-Key: " + strings.Repeat("k", 8000)},
		{badKey, "/list_timeseries", "X-API-Key: " + key[:len(key)-1]}, {badKey, "/list_timeseries", "X-API-Key: " + strings.ToUpper(key)},
		{badKey, "/list_timeseries", "X-API-Key: " + key[:20] + "é" + key[22:]},
		{badKey, "/list_timeseries", "X-API-Key: " + key + "," + key},
	} {
		if body := s.must(t, 401, "GET", c.path, "", "", c.header); body != c.body {
			t.Errorf("%.80s: %q, want %q", c.header, body, c.body)
		}
	}
	if body := s.must(t, 401, "GET", "/list_timeseries", key, "", "X-API-Key: "+key); body != badKey {
		t.Errorf("the header given twice: %q", body)
	}
	mustExec(t, s.db, "GRANT SELECT ON users_table TO "+appRole.name)
	if body := s.must(t, 401, "GET", "/list_timeseries?api_key="+key, "", ""); body != noKey {
		t.Errorf("a key in the query string: %q", body)
	}
}

func TestAllRefusedKeysGetTheSameBytes(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	unknown, _, _ := newKey()
	stored := s.mustUser(t, tenantA, "stored@example.com")
	off := s.mustUser(t, tenantA, "off@example.com")
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "off@example.com")
	expired := s.mustUser(t, tenantA, "expired@example.com")
	s.must(t, 200, "GET", "/list_timeseries", expired, "")
	mustExec(t, s.db, `UPDATE users_table SET expires_at = clock_timestamp() - interval '1 microsecond' WHERE email = 'expired@example.com'`)
	replaced := s.mustUser(t, tenantA, "replaced@example.com")
	mustRun(t, 0, s.dsn, "", "users", "regenerate-key", "-y", "-e", "replaced@example.com")
	keys := map[string]string{"unknown": unknown, "malformed": "tdb_x", "deactivated": off, "expired": expired, "replaced": replaced}
	digest := sha256.Sum256([]byte(stored)) // S4: what a stolen database holds opens nothing
	keys["hex digest"], keys["digest in base64"] = hex.EncodeToString(digest[:]), base64.RawURLEncoding.EncodeToString(digest[:])
	keys["digest in a key's form"] = stored[:13] + base64.RawURLEncoding.EncodeToString(digest[:]) + stored[56:]
	var first string
	for _, name := range []string{"unknown", "malformed", "deactivated", "expired", "replaced", "hex digest",
		"digest in base64", "digest in a key's form"} {
		resp, body, err := s.do("GET", "/values", keys[name], "")
		if err != nil {
			t.Fatal(err)
		}
		resp.Header.Del("Date")
		head, _ := httputil.DumpResponse(resp, false)
		if answer := string(head) + body; first == "" {
			first = answer
		} else if answer != first {
			t.Errorf("%s key: %q, want the same as an unknown key: %q", name, answer, first)
		}
	}
	if !strings.Contains(first, "401") || !strings.Contains(first, badKey) ||
		!strings.Contains(strings.ToLower(first), "www-authenticate: apikey") {
		t.Errorf("a refused key: %q", first)
	}
}

func TestRevokedKeyIsRefusedOnTheNextRequestOfEveryServer(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	servers := []*testServer{s, mustAPI(t, s.dsn)}
	key := s.mustUser(t, tenantA, "a@example.com")
	everywhere := func(want int, key, when string) {
		t.Helper()
		for _, one := range servers {
			if resp, _, err := one.do("GET", "/list_timeseries", key, ""); err != nil || resp.StatusCode != want {
				t.Fatalf("%s: %v %v, want status %d", when, resp, err, want)
			}
		}
	}
	a := []string{"-y", "-e", "a@example.com"}
	everywhere(200, key, "new key")
	mustRun(t, 0, s.dsn, "", append([]string{"users", "deactivate"}, a...)...)
	everywhere(401, key, "deactivated")
	mustRun(t, 0, s.dsn, "", append([]string{"users", "activate"}, a[1:]...)...)
	everywhere(200, key, "activated")

	text, _ := mustRun(t, 0, s.dsn, "", append([]string{"users", "regenerate-key", "-q"}, a...)...)
	second := strings.TrimSpace(text)
	everywhere(401, key, "replaced")
	everywhere(200, second, "the new key")
	mustRun(t, 0, s.dsn, "", append([]string{"users", "deactivate"}, a...)...)
	everywhere(401, second, "the new key, deactivated")
	mustRun(t, 0, s.dsn, "", append([]string{"users", "activate"}, a[1:]...)...) // S10
	everywhere(401, key, "activated after it was replaced")
	everywhere(200, second, "the new key, activated")
}

func TestReadOnlyKeyMayOnlyRead(t *testing.T) { // S17
	t.Parallel()
	s := mustServer(t)
	text, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "--read-only", "-t", tenantA, "-e", "reader@example.com")
	key := strings.TrimSpace(text)
	before := s.stored(t)
	for _, rt := range (&server{}).routes() {
		method, path, _ := strings.Cut(strings.TrimSuffix(rt.pattern, "{$}"), " ")
		if rt.access == "open" || rt.access == "read" && method == "GET" {
			s.must(t, 200, method, path, key, "")
			continue
		}
		for _, body := range []string{emptyRun, `{"name":"x"}`, `{"updates":[]}`, `{`, ""} {
			s.must(t, 403, method, path, key, body)
			s.must(t, 403, method, path+"?run_start_time=2025-01-01", key, "valid_time,value_key,value\n", "Content-Type: text/csv")
		}
	}
	if s.stored(t) != before {
		t.Error("a read-only key stored something")
	}
}

func TestKeyEndsWhenItExpires(t *testing.T) { // S10
	t.Parallel()
	s := mustServer(t)
	for i, when := range []string{"90d", "12h", "P1DT1H", "1h30m", "2200-01-01", "2199-12-31T23:59:59+05:00"} {
		email := fmt.Sprintf("user%d@example.com", i)
		text, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-t", tenantA, "-e", email, "--expires", when)
		key := strings.TrimPrefix(regexp.MustCompile(`API Key: tdb_\S+`).FindString(text), "API Key: ")
		const own = `FROM users_table WHERE email = $1`
		ends := mustQuery(t, s.db, `SELECT to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') `+own, email)
		if list, _ := mustRun(t, 0, s.dsn, "", "users", "list"); ends == "" || !strings.Contains(list, ends) || !strings.Contains(text, ends) {
			t.Errorf("--expires %s: %q; the list is\n%s", when, text, list)
		}
		s.must(t, 200, "GET", "/list_timeseries", key, "")
		mustExec(t, s.db, `UPDATE users_table SET expires_at = clock_timestamp() WHERE email = $1`, email)
		s.must(t, 401, "GET", "/list_timeseries", key, "")
		if list, _ := mustRun(t, 0, s.dsn, "", "users", "list"); !regexp.MustCompile(email + `.* expired `).MatchString(list) {
			t.Errorf("the list does not tell that a key has expired:\n%s", list)
		}
	}
	for _, when := range []string{"", "soon", "2020-01-01", "-1h", "0s", "90", "P1M"} {
		mustRun(t, 2, s.dsn, "", "users", "create", "-t", tenantA, "-e", "late@example.com", "--expires", when)
	}
}

func TestReplacedKeyWorksUntilItsGraceEnds(t *testing.T) { // S10
	t.Parallel()
	s := mustServer(t)
	keys := []string{s.mustUser(t, tenantA, "a@example.com")}
	replace := func(flags ...string) {
		text, _ := mustRun(t, 0, s.dsn, "", append([]string{"users", "regenerate-key", "-q", "-y", "-e", "a@example.com"}, flags...)...)
		keys = append(keys, strings.TrimSpace(text))
	}
	mustAnswer := func(when string, want ...int) {
		t.Helper()
		for i, status := range want {
			if resp, _, err := s.do("GET", "/list_timeseries", keys[i], ""); err != nil || resp.StatusCode != status {
				t.Errorf("%s: key %d: %v %v, want %d", when, i, resp, err, status)
			}
		}
	}
	replace("--grace", "1h")
	mustAnswer("in its grace", 200, 200)
	mustExec(t, s.db, `UPDATE users_table SET is_active = false`)
	mustAnswer("deactivated", 401, 401)
	mustExec(t, s.db, `UPDATE users_table SET is_active = true, expires_at = clock_timestamp()`)
	mustAnswer("expired", 401, 401)
	mustExec(t, s.db, `UPDATE users_table SET expires_at = NULL, previous_ends_at = clock_timestamp()`)
	mustAnswer("after its grace", 401, 200)
	mustRun(t, 0, s.dsn, "", "users", "activate", "-e", "a@example.com")
	mustAnswer("activated after its grace", 401, 200)
	replace("--grace", "PT24H")
	mustAnswer("replaced twice", 401, 200, 200)
	replace("--grace", "1d")
	mustAnswer("only one key before has a grace", 401, 401, 200, 200)
	replace()
	mustAnswer("replaced without a grace", 401, 401, 401, 401, 200)
	replace("--grace", "30d")
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "a@example.com")
	mustAnswer("deactivated in a grace", 401, 401, 401, 401, 401, 401)
	mustRun(t, 0, s.dsn, "", "users", "activate", "-e", "a@example.com")
	mustAnswer("activated in a grace that deactivation has ended", 401, 401, 401, 401, 401, 200)
	mustExec(t, s.db, `UPDATE users_table SET previous_digest = sha256($1::bytea), previous_ends_at = NULL`, []byte(keys[4]))
	mustAnswer("a key before without an end", 401, 401, 401, 401, 401, 200)
	mustExec(t, s.db, `UPDATE users_table SET expires_at = clock_timestamp()`)
	_, stderr := mustRun(t, 1, s.dsn, "", "users", "regenerate-key", "-q", "-y", "-e", "a@example.com")
	if !strings.Contains(stderr, "--expires") {
		t.Errorf("a new key for an expired user: %q", stderr)
	}
	replace("--expires", "90d", "--grace", "1h")
	mustAnswer("replaced after it had expired", 401, 401, 401, 401, 401, 401, 200)
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "a@example.com")
	replace("--grace", "1h")
	mustRun(t, 0, s.dsn, "", "users", "activate", "-e", "a@example.com")
	mustAnswer("replaced while it was deactivated", 401, 401, 401, 401, 401, 401, 401, 200)
	for _, grace := range []string{"", "-1h", "long", "P1Y"} {
		mustRun(t, 2, s.dsn, "", "users", "regenerate-key", "-y", "-e", "a@example.com", "--grace", grace)
	}
	mustAnswer("after wrong usage", 401, 401, 401, 401, 401, 401, 401, 200)
}

// Clients hammer two servers of one database while a user is deactivated and activated again. A request that began after
// deactivate had returned, and was answered before activate was begun, must not have been let in.
func TestDeactivationHoldsForEveryLaterRequestUnderLoad(t *testing.T) { // S9
	t.Parallel()
	s := mustServer(t)
	servers := []*testServer{s, mustAPI(t, s.dsn)}
	key := s.mustUser(t, tenantA, "a@example.com")
	var phase atomic.Int64 // odd while the user is deactivated for certain
	var refused, admitted, wrong atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				before := phase.Load()
				resp, _, err := servers[i%2].do("GET", "/list_timeseries", key, "")
				if err != nil || !slices.Contains([]int{200, 401, 429}, resp.StatusCode) {
					t.Errorf("%v %v", resp, err)
					return
				}
				if after := phase.Load(); before == after && before%2 == 1 && resp.StatusCode == 200 {
					wrong.Add(1)
				}
				map[bool]*atomic.Int64{true: &admitted, false: &refused}[resp.StatusCode == 200].Add(1)
			}
		})
	}
	const rounds = 200
	for range rounds {
		mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "a@example.com")
		phase.Add(1)
		for done := refused.Load() + 4; refused.Load() < done && !t.Failed(); {
			time.Sleep(100 * time.Microsecond)
		}
		phase.Add(1)
		mustRun(t, 0, s.dsn, "", "users", "activate", "-e", "a@example.com")
	}
	close(stop)
	clients.Wait()
	if wrong.Load() != 0 || admitted.Load() < rounds || refused.Load() < rounds {
		t.Errorf("in %d rounds %d requests were admitted after deactivate had returned (%d admitted, %d refused in all)",
			rounds, wrong.Load(), admitted.Load(), refused.Load())
	}
}

// A command that is interrupted leaves all of it or nothing.
func TestInterruptedCommandLeavesAllOrNothing(t *testing.T) { // S12
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	full, outcomes, whole := "", map[bool]int{}, time.Duration(0) // how long an undisturbed command takes here and now
	for round := range 60 {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.Int63n(int64(whole)*3/2+1)))
		if round%20 == 0 {
			ctx = context.Background()
		}
		env := func(name string) string { return map[string]string{"TIMEDB_DSN": dsn}[name] }
		var out bytes.Buffer
		code := run(ctx, []string{"create", "tables", "-y", "--with-users"}, env, strings.NewReader(""), &out, &out)
		cancel()
		if round%20 == 0 {
			whole = time.Since(begin)
		}
		mustExec(t, db, `SELECT pg_advisory_xact_lock(hashtextextended('timedb create tables', 0))`) // until it has ended
		got := relations(t, db, "public")
		if round == 0 {
			full = got
		}
		if got != full && got != "" || code == 0 && got != full {
			t.Fatalf("exit %d left %q, want nothing or %q", code, got, full)
		}
		outcomes[got == full]++
		mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	}
	if outcomes[true] < 4 || outcomes[false] < 2 { // three were not interrupted
		t.Errorf("the interruptions came all too early or all too late: %v", outcomes)
	}
}

func TestDoubtNeverOpensTheDoor(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	admin := mustOpen(t, databaseURL("", nil))
	name := mustQuery(t, s.db, `SELECT current_database()`)
	disconnect := `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '` + name + `' AND usename = '` + appRole.name + `'`
	for _, c := range []struct {
		db           *sql.DB
		breaks, ends string
	}{
		{s.db, `ALTER TABLE users_table RENAME TO elsewhere`, `ALTER TABLE elsewhere RENAME TO users_table`},
		{s.db, `REVOKE SELECT ON users_table FROM ` + appRole.name + `; REVOKE SELECT (key_digest) ON users_table FROM ` + appRole.name,
			`GRANT SELECT ON users_table TO ` + appRole.name},
		{s.db, `ALTER TABLE users_table RENAME COLUMN is_active TO was_active`,
			`ALTER TABLE users_table RENAME COLUMN was_active TO is_active`},
		{s.db, `CREATE SCHEMA hidden; ALTER TABLE users_table SET SCHEMA hidden`,
			`ALTER TABLE hidden.users_table SET SCHEMA public; DROP SCHEMA hidden`},
		{admin, `ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS false; ` + disconnect,
			`ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS true`},
		{s.db, `DROP TABLE users_table`, ""},
	} {
		mustExec(t, c.db, c.breaks)
		for _, path := range []string{"/values", "/list_timeseries", "/nope"} {
			for _, key := range []string{key, ""} {
				resp, body, err := s.do("GET", path, key, "")
				if err != nil || resp.StatusCode != 503 && (key != "" || resp.StatusCode != 401) {
					t.Errorf("after %q GET %s: %v %v, want 503", c.breaks, path, resp, err)
					continue
				}
				if resp.StatusCode == 503 && resp.Header.Get("Retry-After") == "" ||
					regexp.MustCompile(`pq:|users_table|load|SELECT`).MatchString(body) {
					t.Errorf("after %q GET %s: %v %q", c.breaks, path, resp.Header, body)
				}
			}
		}
		if c.db == admin {
			s.must(t, 503, "GET", "/healthz", "", "")
		}
		if c.ends == "" {
			break
		}
		mustExec(t, c.db, c.ends)
		for tries := 0; ; tries++ { // a statement that was planned before may fail once on each connection
			if resp, _, err := s.do("GET", "/list_timeseries", key, ""); err == nil && resp.StatusCode == 200 {
				break
			} else if tries > 100 {
				t.Fatalf("after %q was undone: %v %v, want 200", c.breaks, resp, err)
			}
		}
	}
	mustExec(t, s.db, `DROP TABLE values_table CASCADE`)
	for _, path := range []string{"/values", "/values?mode=overlapping&detail=true"} {
		if resp, _, err := s.do("GET", path, key, ""); err != nil || resp.StatusCode != 503 {
			t.Errorf("without tables GET %s: %v %v", path, resp, err)
		}
	}
}

// No server that is asked here has ever seen a users_table.
func TestUnknownStateOfUsersTableIsNotOpen(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn)
	s.must(t, 200, "GET", "/list_timeseries", "", "")
	mustExec(t, s.db, `REVOKE SELECT ON pg_catalog.pg_class FROM PUBLIC`) // the data can be read; whether there are users, not
	s.must(t, 503, "GET", "/list_timeseries", "", "")
	s.must(t, 503, "POST", "/upload", "", oneValue)
	mustExec(t, s.db, `GRANT SELECT ON pg_catalog.pg_class TO PUBLIC`)
	s.must(t, 200, "GET", "/list_timeseries", "", "")
	admin, name := mustOpen(t, databaseURL("", nil)), mustQuery(t, s.db, `SELECT current_database()`)
	mustExec(t, admin, `ALTER DATABASE `+name+` ALLOW_CONNECTIONS false; SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '`+name+`'`)
	s.must(t, 503, "GET", "/list_timeseries", "", "")
	s.must(t, 503, "POST", "/upload", "", oneValue)
	mustExec(t, admin, `ALTER DATABASE `+name+` ALLOW_CONNECTIONS true`)
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
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users") // without --app-role: keys cannot be looked up yet
	s.must(t, 401, "GET", "/values", "", "")
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 503, "GET", "/values", key, "")
	mustCreateTables(t, dsn)
	if text := s.must(t, 200, "GET", "/values", key, ""); strings.Contains(text, "load") {
		t.Errorf("a tenant sees what was stored without users: %s", text)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	mustCreateTables(t, dsn)
	s.must(t, 503, "GET", "/values", key, "") // it was there: its absence is a fault
	s.must(t, 401, "GET", "/values", "", "")
}

func TestRequireAuthRefusesEveryoneWithoutUsersTable(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn, "--require-auth")
	unknown, _, _ := newKey()
	for _, key := range []string{"", unknown} {
		s.must(t, 503, "GET", "/list_timeseries", key, "")
		s.must(t, 503, "POST", "/upload", key, emptyRun)
	}
	s.must(t, 200, "GET", "/", "", "")
}

func TestOpenModeIsNotForWebPages(t *testing.T) { // S24
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn)
	port := s.url[strings.LastIndex(s.url, ":"):]
	for _, c := range []struct {
		status int
		header []string
	}{
		{200, nil}, {200, []string{"Host: localhost" + port}}, {200, []string{"Host: [::1]" + port}}, {200, []string{"Origin: " + s.url}},
		{403, []string{"Host: evil.example"}}, {403, []string{"Host: evil.example" + port}},
		{403, []string{"Host: 127.0.0.1.evil.example"}},
		{403, []string{"Host: 192.0.2.1" + port}}, {403, []string{"Origin: https://evil.example"}}, {403, []string{"Origin: null"}},
		{403, []string{"Sec-Fetch-Site: cross-site"}}, {403, []string{"Sec-Fetch-Site: same-site"}},
	} {
		s.must(t, c.status, "POST", "/upload", "", emptyRun, c.header...)
	}
	s.must(t, 403, "GET", "/values", "", "", "Host: evil.example")
}

func TestTooManyBadKeysAreThrottledAndValidOnesAreNot(t *testing.T) { // S31, S27
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	unknown, _, _ := newKey()
	statuses := map[int]int{}
	const tries = 3 * failureBurst
	for i := range tries {
		// Who sends is who connects, whatever the request says.
		resp, body, err := s.do("GET", "/values", pick(rand.New(rand.NewSource(int64(i))), "x", unknown), "", fmt.Sprintf("X-Forwarded-For: 192.0.2.%d", i%200))
		if err != nil {
			t.Fatal(err)
		}
		if statuses[resp.StatusCode]++; resp.StatusCode == 401 && body != badKey || resp.StatusCode == 429 && !strings.Contains(body, "minute") {
			t.Fatalf("%v %q", resp, body)
		}
		if i%100 == 0 {
			s.must(t, 200, "GET", "/list_timeseries", key, "")
			s.must(t, 401, "GET", "/list_timeseries", "", "") // no key is no bad key
		}
	}
	if statuses[401] < failureBurst || statuses[429] == 0 || statuses[401]+statuses[429] != tries { // a minute may have turned
		t.Errorf("%d bad keys were answered %v", tries, statuses)
	}
	for range tries {
		s.must(t, 401, "GET", "/list_timeseries", "", "")
	}
	s.stop()
	if lines := strings.Count(s.log.String(), `"no key"`); lines < failureBurst || lines > 2*failureBurst {
		t.Errorf("%d requests without a key are in the log as %d lines", tries, lines)
	}
	bad, throttled := strings.Count(s.log.String(), "status=401"), strings.Count(s.log.String(), "status=429")
	if bad > statuses[401]+2*failureBurst || throttled < 1 || throttled > 2 { // the first of each minute
		t.Errorf("%d refusals and %d that were throttled are in the log", bad, throttled)
	}
}

func TestMemoryOfTheThrottleIsBounded(t *testing.T) { // S31
	t.Parallel()
	var f failures
	for i := range 3 * maxAddresses {
		if n := f.add("", fmt.Sprintf("[2001:db8::%x]:%d", i, 1+i%1000)); n != 1 {
			t.Fatalf("the first failure of an address counts as %d", n)
		}
		if len(f.byAddress) > maxAddresses {
			t.Fatalf("%d addresses are remembered", len(f.byAddress))
		}
	}
	for want := 1; want <= 5; want++ {
		if n := f.add("", fmt.Sprintf("192.0.2.1:%d", want)); n != want && n != 1 { // a minute may have turned
			t.Errorf("failure %d of an address counts as %d", want, n)
		}
	}
}

func TestLogTellsWhoAndWhyAndCannotBeForged(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	unknown, _, _ := newKey()
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	s.must(t, 401, "GET", "/list_timeseries", unknown, "")
	mustRun(t, 0, s.dsn, "", "users", "deactivate", "-y", "-e", "a@example.com")
	s.must(t, 401, "GET", "/list_timeseries", key, "")
	mustRun(t, 0, s.dsn, "", "users", "activate", "-e", "a@example.com")
	for _, path := range []string{"/x%0d%0atime=2025-01-01T00:00:00Z%20level=INFO%20msg=forged", "/x%0alevel=INFO", "/%1b[2Jx",
		"/%e2%80%a8x", "/%00"} {
		s.must(t, 404, "GET", path, key, "")
		s.must(t, 401, "GET", path, "", "")
	}
	s.must(t, 422, "GET", "/values?series_key=a%0d%0alevel=INFO%20msg=forged&nope=1", key, "")
	s.must(t, 401, "GET", "/"+unknown[:12]+"%0d%0aforged", "x", "")
	s.must(t, 404, "GET", "/"+key, key, "") // a key that is pasted into the wrong place
	s.must(t, 422, "GET", "/values?limit="+key, key, "")
	s.must(t, 404, "GET", "/values?series_key="+key, key, "")
	s.must(t, 422, "GET", "/values?"+key+"=1", key, "")
	s.stop()
	text := s.log.String()
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "time=") || !strings.Contains(line, "Z level=") {
			t.Errorf("a log line that is not ours, or not in UTC: %q", line)
		}
	}
	if strings.ContainsAny(text, "\x1b\r\x00") || strings.Contains(text, "\u2028") {
		t.Error("the log holds control characters")
	}
	keyID := mustQuery(t, s.db, `SELECT key_id FROM users_table`)
	for _, want := range []string{keyID, tenantA, "127.0.0.1:", "status=200", "status=401", "deactivated", "unknown"} {
		if !strings.Contains(text, want) {
			t.Errorf("the log has no %q:\n%s", want, text)
		}
	}
	for _, secret := range []string{key[13:], unknown[13:]} {
		if strings.Contains(text, secret) {
			t.Error("the log holds a key")
		}
	}
}

// The program itself, in another time zone than UTC, stopped by a signal.
func TestProgramLogsInUTCAndStopsOnSIGTERM(t *testing.T) { // S27, S30
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	binary := filepath.Join(t.TempDir(), "timedb")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v %s", err, out)
	}
	cmd := exec.Command(binary, "api", "--port", "0")
	cmd.Env = append(os.Environ(), "TZ=Asia/Tokyo", "TIMEDB_DSN="+asAppRole(dsn))
	var out, log logBuffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for !servesLine.MatchString(out.String()) {
		time.Sleep(time.Millisecond)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("stopped by SIGTERM: %v", err)
	}
	for line := range strings.Lines(log.String()) {
		if !regexp.MustCompile(`^time=\S+Z level=`).MatchString(line) {
			t.Errorf("a line that is not in UTC: %q", line)
		}
	}
	if !strings.Contains(log.String(), "stopping") {
		t.Errorf("the log is %q", log.String())
	}
}

func TestUseOfAKeyIsNoted(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "GET", "/list_timeseries", key, "")
	for mustQuery(t, s.db, `SELECT last_used_at FROM users_table`) == "" { // it is written beside the request
		time.Sleep(time.Millisecond)
	}
}

// inspect parses one source file and calls fn for each of its nodes.
func inspect(t *testing.T, file string, fn func(ast.Node)) {
	t.Helper()
	tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(tree, func(n ast.Node) bool { fn(n); return true })
}

func TestSQLOnTenantDataNamesTheTenant(t *testing.T) { // S14
	touches := regexp.MustCompile(`(?i)\b(FROM|JOIN|INTO|UPDATE|ONLY)\s+(runs_table|series_table|values_table|current_values)\b`)
	var seen, withCaller int
	check := func(where string, needsTenant bool, tree ast.Node) {
		ast.Inspect(tree, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING || !touches.MatchString(lit.Value) {
				return true
			}
			seen++
			if !needsTenant {
				t.Errorf("%s touches tenant data without a Caller: %s", where, lit.Value)
			}
			if !regexp.MustCompile(`tenant_id = \$1|\(tenant_id,`).MatchString(lit.Value) {
				t.Errorf("%s: SQL without tenant_id: %s", where, lit.Value)
			}
			return true
		})
	}
	tree, err := parser.ParseFile(token.NewFileSet(), "store.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, decl := range tree.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok {
			check("a constant", true, decl) // it is run by some function below
			continue
		}
		hasCaller := slices.ContainsFunc(fn.Type.Params.List, func(f *ast.Field) bool {
			id, ok := f.Type.(*ast.Ident)
			return ok && id.Name == "Caller"
		})
		if hasCaller {
			withCaller++
		}
		check(fn.Name.Name, hasCaller, fn)
	}
	if seen < 5 || withCaller < 5 {
		t.Errorf("only %d statements and %d functions with a Caller were found: does this test still look in the right place?",
			seen, withCaller)
	}
}

// SQL is never assembled: wherever it is run, it is a literal, a constant or a parameter of that name; and whoever calls
// with such a parameter gives one of these. What create and delete tables run comes from schema.sql.
func TestSQLIsNotAssembled(t *testing.T) { // S18
	runs := map[string]int{"QueryContext": 1, "ExecContext": 1, "QueryRowContext": 1, "PrepareContext": 1, "query": 1, "exec": 1, "document": 1}
	seen := 0
	for _, file := range []string{"store.go", "cli.go", "server.go", "auth.go"} {
		inspect(t, file, func(n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return
			}
			name := ""
			switch fn := call.Fun.(type) {
			case *ast.SelectorExpr:
				name = fn.Sel.Name
			case *ast.Ident:
				name = fn.Name
			}
			at, ok := runs[name]
			if !ok || len(call.Args) <= at {
				return
			}
			seen++
			switch sql := call.Args[at].(type) {
			case *ast.BasicLit:
			case *ast.Ident:
				prepared := sql.Name == "args" && call.Ellipsis.IsValid() // a statement that was prepared from a query
				if sql.Name != "query" && !prepared && (file != "cli.go" || sql.Name != "text") {
					t.Errorf("%s: %s runs %s", file, name, sql.Name)
				}
			case *ast.CallExpr:
				if fn, ok := sql.Fun.(*ast.Ident); !ok || fn.Name != "schemaSections" {
					t.Errorf("%s: %s runs what another call made", file, name)
				}
			case *ast.SelectorExpr: // c.run(c, ctx, st) and the like
				seen--
			default:
				t.Errorf("%s: %s runs a %T", file, name, sql)
			}
		})
	}
	if seen < 15 {
		t.Errorf("only %d places were found: does this test still look in the right place?", seen)
	}
}

func TestCallersExitsAndSQLAreWhereTheyBelong(t *testing.T) {
	limits, compares := map[string]bool{}, 0
	defer func() {
		for _, name := range []string{"ReadHeaderTimeout", "ReadTimeout", "WriteTimeout", "IdleTimeout", "MaxHeaderBytes"} {
			if !limits[name] {
				t.Errorf("the server has no %s", name)
			}
		}
		if compares != 1 {
			t.Errorf("digests are compared in constant time in %d places", compares)
		}
	}()
	files, _ := filepath.Glob("*.go")
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		inspect(t, file, func(n ast.Node) {
			switch n := n.(type) {
			case *ast.CompositeLit:
				if id, ok := n.Type.(*ast.Ident); ok && id.Name == "Caller" && file != "auth.go" {
					t.Errorf("%s makes a Caller", file)
				}
			case *ast.SelectorExpr:
				if id, ok := n.X.(*ast.Ident); ok && id.Name == "os" && n.Sel.Name == "Exit" && file != "main.go" {
					t.Errorf("%s calls os.Exit", file)
				}
			case *ast.KeyValueExpr: // S20
				if id, ok := n.Key.(*ast.Ident); ok && file == "cli.go" {
					limits[id.Name] = true
				}
			case *ast.CallExpr: // S5, S7
				if fn, ok := n.Fun.(*ast.SelectorExpr); ok && fn.Sel.Name == "ConstantTimeCompare" {
					compares++
				} else if id, ok := n.Fun.(*ast.Ident); ok && id.Name == "newKey" && file != "cli.go" {
					t.Errorf("%s makes keys", file)
				}
			case *ast.ImportSpec:
				if path := n.Path.Value; strings.HasSuffix(path, `/rand"`) && (path != `"crypto/rand"` || file != "auth.go") {
					t.Errorf("%s imports %s", file, path)
				}
				if path := n.Path.Value; (path == `"database/sql"` || strings.Contains(path, "lib/pq")) && file == "auth.go" ||
					path == `"net/http"` && file == "store.go" {
					t.Errorf("%s imports %s", file, path)
				}
			}
		})
	}
}

func TestEveryKeyOfTenantTablesStartsWithTenantID(t *testing.T) { // S15
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	db := mustOpen(t, dsn)
	const keys = `SELECT conrelid::regclass::text AS tab, conname::text AS name, conkey[1] AS col, conrelid AS rel FROM pg_constraint WHERE contype IN ('p', 'u', 'f')
		UNION ALL SELECT confrelid::regclass::text, conname, confkey[1], confrelid FROM pg_constraint WHERE contype = 'f'
		UNION ALL SELECT indrelid::regclass::text, indexrelid::regclass::text, indkey[0], indrelid FROM pg_index WHERE indisunique`
	const of = `(` + keys + `) k JOIN pg_attribute a ON a.attrelid = k.rel AND a.attnum = k.col WHERE tab IN ('runs_table', 'series_table', 'values_table')`
	if bad := mustQuery(t, db, `SELECT string_agg(tab || ': ' || name, ', ') FROM `+of+` AND attname <> 'tenant_id'`); bad != "" {
		t.Errorf("keys that do not start with tenant_id: %s", bad)
	}
	if n, _ := strconv.Atoi(mustQuery(t, db, `SELECT count(*) FROM `+of)); n < 9 {
		t.Errorf("only %d keys were found", n)
	}
}

// docs/SECURITY.md names for each item the functions that enforce it and the tests; they must exist.
func TestSecurityDocumentNamesWhatThereIs(t *testing.T) { // S32
	text, err := os.ReadFile("docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	declared := map[string]bool{}
	for _, file := range []string{"auth.go", "server.go", "store.go", "cli.go", "main.go",
		"auth_test.go", "cli_test.go", "faults_test.go", "server_test.go", "store_test.go"} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^(?:func (?:\([^)]*\) )?|\t|var |type )([A-Za-z0-9]+)`).FindAllStringSubmatch(string(source), -1) {
			declared[file+":"+m[1]] = true
		}
	}
	for i := 1; i <= 32; i++ {
		row := regexp.MustCompile(fmt.Sprintf(`(?m)^\| S%d \|.*$`, i)).FindString(string(text))
		tests := regexp.MustCompile("Test[A-Za-z0-9]+").FindAllString(row, -1)
		places := regexp.MustCompile("`([a-z_]+\\.go):([A-Za-z0-9]+)`").FindAllStringSubmatch(row, -1)
		if len(tests) == 0 || len(places) == 0 && !strings.Contains(row, "schema.sql") && !strings.Contains(row, "docs/") {
			t.Errorf("S%d: %q names no place or no test", i, row)
		}
		for _, name := range tests {
			if !slices.ContainsFunc([]string{"auth", "cli", "faults", "server", "store"},
				func(file string) bool { return declared[file+"_test.go:"+name] }) {
				t.Errorf("S%d: there is no %s", i, name)
			}
		}
		for _, place := range places {
			if !declared[place[1]+":"+place[2]] {
				t.Errorf("S%d: there is no %s in %s", i, place[2], place[1])
			}
		}
	}
}

func TestTenantInTheRequestChangesNothing(t *testing.T) { // S13
	t.Parallel()
	s := mustServer(t)
	a, b := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantB, "b@example.com")
	s.must(t, 200, "POST", "/upload", a, oneValue)
	before := s.stored(t)
	s.mustAll(t, b, []httpCase{
		{"POST", "/upload", strings.Replace(oneValue, `{`, `{"tenant_id":"`+tenantA+`",`, 1), 403, []string{"tenant_id"}},
		{"POST", "/upload?tenant_id=" + tenantA, oneValue, 403, []string{"tenant_id"}},
		{"PUT", "/values", `{"updates":[{"tenant_id":"` + tenantA + `","valid_time":"2025-01-01","series_key":"load","value":5}]}`, 403, []string{"tenant_id"}},
		{"GET", "/runs?tenant_id=" + tenantA, "", 403, []string{"tenant_id"}},
		{"GET", "/values?tenant_id=" + tenantA, "", 403, []string{"tenant_id"}},
		{"GET", "/list_timeseries?tenant_id=" + tenantA, "", 403, []string{"tenant_id"}},
		{"GET", "/values?tenant_id=nonsense", "", 422, []string{"tenant_id"}},
		{"GET", "/values?tenant_id=" + strings.ToUpper(tenantB), "", 200, []string{`"count":0`}},
	})
	for _, header := range []string{"X-Tenant-ID: ", "Tenant-Id: ", "X-Forwarded-User: ", "Cookie: tenant_id="} {
		if text := s.must(t, 200, "GET", "/values", b, "", header+tenantA); strings.Contains(text, "load") {
			t.Errorf("%s opens another tenant: %s", header, text)
		}
	}
	if s.stored(t) != before {
		t.Error("a refused request stored something")
	}
	s.must(t, 200, "POST", "/upload", a, strings.Replace(emptyRun, `{`, `{"tenant_id":"`+tenantA+`",`, 1))
}

func TestIDsOfAnotherTenantAreLikeIDsThatNeverExisted(t *testing.T) { // S16
	t.Parallel()
	s := mustServer(t)
	a, b := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantB, "b@example.com")
	uploaded := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", a, oneValue))
	seriesA, runA := uploaded.SeriesIDs["load"], uploaded.RunID
	own := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", b,
		strings.ReplaceAll(strings.ReplaceAll(oneValue, "load", "own"), "known_time", "run_finish_time")))
	const point = `"valid_time":"2025-01-01T00:00:00Z","value":7}]}`
	before, aData := s.stored(t), s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, "")
	// What each route is asked with an id of tenant A in place of ID, then with one that never existed.
	type probe struct{ query, body, id, never string }
	refused := map[string][]probe{
		"GET /values": {{"?series_id=ID", "", seriesA, nobody}, {"?series_key=ID", "", "load", "liad"},
			{"?mode=overlapping&series_id=" + own.SeriesIDs["own"] + "&series_id=ID", "", seriesA, nobody}},
		"PUT /values": {{"", `{"updates":[{"series_id":"ID",` + point, seriesA, nobody},
			{"", `{"updates":[{"series_key":"ID",` + point, "load", "liad"},
			{"", `{"updates":[{"series_id":"` + seriesA + `","run_id":"ID",` + point, runA, nobody},
			{"", `{"updates":[{"series_key":"own","run_id":"ID",` + point, runA, nobody},
			{"", `{"updates":[{"series_key":"own","known_time":"ID",` + point, "2025-01-01T00:00:00Z", "2024-05-05T00:00:00Z"}},
		"POST /upload": {{"", `{"run_start_time":"2025-01-01","value_rows":[{"series_id":"ID",` + point, seriesA, nobody},
			{"", `{"run_start_time":"2025-01-01","value_rows":[{"series_id":"ID","value_key":"load",` + point, seriesA, nobody},
			{"?run_start_time=2025-01-01", "valid_time,value,series_id\n2025-01-01,1,ID\n", seriesA, nobody}},
		// These take no id: what they answer, or store, is looked at below.
		"POST /series": {}, "GET /list_timeseries": {}, "GET /runs": {},
	}
	// What tenant B may be answered 200 for must not show anything of tenant A's.
	shown := map[string][]string{"GET /values": {"", "?mode=overlapping&detail=true", "?format=csv", "?bucket=1d&agg=sum", "?as_of=2100-01-01"},
		"GET /list_timeseries": {""}, "GET /runs": {"", "?workflow_id=api-workflow", "?start_known=2000-01-01"}}
	for _, rt := range (&server{}).routes() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		probes, known := refused[rt.pattern]
		if rt.access == "open" {
			continue
		}
		if !known || rt.access == "read" && shown[rt.pattern] == nil {
			t.Errorf("%s is not tried with another tenant's ids: add how to this test", rt.pattern)
		}
		for _, c := range probes {
			var header []string
			if !strings.HasPrefix(c.body, "{") {
				header = []string{"Content-Type: text/csv"}
			}
			var answers [2]string
			for i, id := range []string{c.id, c.never} {
				text := s.must(t, 404, method, path+strings.ReplaceAll(c.query, "ID", url.QueryEscape(id)), b, strings.ReplaceAll(c.body, "ID", id), header...)
				answers[i] = strings.ReplaceAll(text, id, "ID")
			}
			if answers[0] != answers[1] {
				t.Errorf("%s %v: %q for another tenant's, %q for one that never existed", rt.pattern, c, answers[0], answers[1])
			}
			if s.stored(t) != before {
				t.Fatalf("%s %v stored something", rt.pattern, c)
			}
		}
		for _, query := range shown[rt.pattern] {
			if text := s.must(t, 200, method, path+query, b, ""); strings.Contains(text, "load") || strings.Contains(text, runA) ||
				strings.Contains(text, seriesA) {
				t.Errorf("%s%s shows another tenant's: %s", rt.pattern, query, text)
			}
		}
	}
	// A series of the same name is another one, whatever its unit.
	for _, name := range []string{"load", "liad"} {
		if text := s.must(t, 200, "POST", "/series", b, `{"name":"`+name+`","unit":"kW"}`); !strings.Contains(text, "created") || strings.Contains(text, seriesA) {
			t.Errorf("tenant B creates %q: %s", name, text)
		}
	}
	// A run_id is the tenant's own: another tenant's choice of the same neither clashes nor tells.
	for _, id := range []string{runA, nobody} {
		s.must(t, 200, "POST", "/upload", b, strings.Replace(emptyRun, `{`, `{"run_id":"`+id+`",`, 1))
	}
	if got := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, ""); got != aData {
		t.Errorf("tenant A's data changed from %s to %s", aData, got)
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
