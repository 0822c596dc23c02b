package main

// The tests drive timedb as its users do, through the command line's run and through HTTP, on a real PostgreSQL; SQL is
// used to look at what was stored and to break things. Each test has a database of its own, and the API runs under a role
// that has no more than `create tables --app-role` grants.
//
// Contents
//   Harness          mustDatabase, mustRun, mustAPI, mustServer, and requests
//   Command line     DSN, exit codes, tables, users, questions
//   Authentication   keys, life cycle, open mode, faults of the database, limits, log
//   Source           what can be read off the source and the catalog
//   Tenancy          one tenant's ids in another's hands
//   Upload           what is stored, what is refused, retries
//   Read             rows, modes, windows, streams
//   Model            random histories against a naive model
//   Correct          PUT /values
//   Document         openapi.json against the routes, the answers and its own examples
//   SQL              what docs/SQL.md says, run as it stands there
//   Faults           killed servers and databases, cut and frozen connections, overload, shutdown; script/faults runs them for longer
//   Benchmarks, fuzz targets

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/lib/pq"
)

// ---- Harness

const (
	tenantA = "aaaaaaaa-0000-4000-8000-00000000000a"
	tenantB = "bbbbbbbb-0000-4000-8000-00000000000b"
	nobody  = "99999999-9999-4999-8999-999999999999" // an id that never existed
)

var faults = flag.Int("faults", 1, "how many times as long each TestFault runs; script/faults has it run 20 times as long")
var histories = flag.Int("histories", 2000, "how many random histories TestReadsAgreeWithNaiveModel checks")

// appRole is the role that the API runs under, one for the whole process; a role belongs to the cluster.
var appRole struct {
	once           sync.Once
	name, password string
}

func TestMain(m *testing.M) {
	if os.Getenv("TEST_RUNS_THE_PROGRAM") != "" {
		main()
	}
	m.Run() // its code becomes the exit code when TestMain returns
	if appRole.name != "" {
		if db, err := sql.Open("postgres", databaseURL("", nil)); err == nil {
			_, err = db.Exec("DROP ROLE IF EXISTS " + appRole.name)
			if err != nil {
				fmt.Fprintln(os.Stderr, "the test role is left over:", err)
			}
			db.Close()
		}
	}
}

// databaseURL is TEST_DATABASE_URL with another database and another user, unless these are empty.
func databaseURL(database string, who *url.Userinfo) string {
	u, err := url.Parse(os.Getenv("TEST_DATABASE_URL"))
	if err != nil {
		return ""
	}
	if database != "" {
		u.Path = "/" + database
	}
	if who != nil {
		u.User = who
	}
	q := u.Query()
	if !q.Has("sslmode") {
		q.Set("sslmode", "disable") // lib/pq, used bare here, would require TLS
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// mustDatabase creates an empty database for this test and returns its URL, as its owner.
func mustDatabase(t testing.TB) string {
	t.Helper()
	if os.Getenv("TEST_DATABASE_URL") == "" {
		t.Fatal("TEST_DATABASE_URL is not set: run script/test, which starts a private PostgreSQL and sets it")
	}
	admin := mustOpen(t, databaseURL("", nil))
	name := fmt.Sprintf("timedb_test_%016x", rand.Uint64())
	mustExec(t, admin, "CREATE DATABASE "+name)
	t.Cleanup(func() {
		if found := secretsIn(t, databaseURL(name, nil)); found != "" { // S6
			t.Errorf("a dump of the database holds %s", found)
		}
		mustExec(t, admin, "DROP DATABASE "+name+" WITH (FORCE)")
	})
	mustExec(t, admin, "ALTER DATABASE "+name+" SET synchronous_commit = off") // nobody needs this data tomorrow
	appRole.once.Do(func() {
		appRole.name = fmt.Sprintf("timedb_test_app_%016x", rand.Uint64())
		appRole.password = fmt.Sprintf("app-password-%x", rand.Uint64())
		mustExec(t, admin, "CREATE ROLE "+appRole.name+" LOGIN PASSWORD '"+appRole.password+"'")
	})
	return databaseURL(name, nil)
}

// secretsIn looks for whole keys and for passwords in a dump of the database, and says what it found.
func secretsIn(t testing.TB, dsn string) string {
	t.Helper()
	dump, err := exec.Command("pg_dump", dsn).Output()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok && bytes.Contains(failed.Stderr, []byte("does not exist")) {
		return "" // the test has dropped what it made
	}
	if err != nil {
		t.Fatalf("pg_dump (of Debian's package postgresql): %v", err)
	}
	password, _ := mustParse(t, dsn).User.Password()
	return secretsOf(string(dump), password)
}

// secretsOf says whether text holds a whole key, the password or that of the API's role.
func secretsOf(text, password string) string {
	switch {
	case wholeKey.MatchString(text):
		return "a key"
	case appRole.password != "" && strings.Contains(text, appRole.password) || password != "" && strings.Contains(text, password):
		return "a password"
	}
	return ""
}

func mustParse(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal("a URL cannot be parsed")
	}
	return u
}

// asAppRole is the same database as the API's role.
func asAppRole(dsn string) string {
	u, _ := url.Parse(dsn)
	return databaseURL(strings.TrimPrefix(u.Path, "/"), url.UserPassword(appRole.name, appRole.password))
}

func mustOpen(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal("the database's URL cannot be opened")
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func mustExec(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// mustQuery returns the one value that query selects, as text; NULL and no row are "".
func mustQuery(t testing.TB, db *sql.DB, query string, args ...any) string {
	t.Helper()
	var text sql.NullString
	if err := db.QueryRow(query, args...).Scan(&text); err != nil && err != sql.ErrNoRows {
		t.Fatalf("%s: %v", query, err)
	}
	return text.String
}

// runIn is one command line with its environment and its input.
func runIn(env map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), args, func(name string) string { return env[name] }, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// mustRun runs a command line on dsn, which must end with want, and returns what it printed.
func mustRun(t testing.TB, want int, dsn, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	code, stdout, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, stdin, args...)
	if code != want {
		t.Fatalf("timedb %s: exit %d, want %d\nstdout: %s\nstderr: %s", strings.Join(args, " "), code, want, stdout, stderr)
	}
	if code != 0 && !strings.Contains(stderr, "ERROR: ") {
		t.Fatalf("timedb %s: exit %d without ERROR: on stderr: %q", strings.Join(args, " "), code, stderr)
	}
	return stdout, stderr
}

// mustCreateTables makes the tables, with users, and grants the API's role its part.
func mustCreateTables(t testing.TB, dsn string, more ...string) {
	t.Helper()
	mustRun(t, 0, dsn, "", append([]string{"create", "tables", "-y", "--app-role", appRole.name}, more...)...)
}

// logBuffer is what a server writes to stdout or stderr, readable at any time.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// testServer is a running `timedb api` and the database under it.
type testServer struct {
	url, dsn string
	db       *sql.DB // as owner
	log      *logBuffer
	stop     func() int // asks the server to stop, waits for its end and returns the exit code
	client   *http.Client
}

var servesLine = regexp.MustCompile(`timedb serves (https?://\S+)`)

// mustAPI starts `timedb api` on dsn as the API's role.
func mustAPI(t testing.TB, dsn string, args ...string) *testServer {
	t.Helper()
	return mustAPIOn(t, dsn, asAppRole(dsn), args...)
}

// mustAPIOn starts `timedb api` on the DSN serving; dsn is the same database as its owner.
func mustAPIOn(t testing.TB, dsn, serving string, args ...string) *testServer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &testServer{dsn: dsn, db: mustOpen(t, dsn), log: &logBuffer{}}
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100, ExpectContinueTimeout: time.Minute}}
	out, done := &logBuffer{}, make(chan struct{})
	code := -1
	go func() {
		defer close(done)
		env := func(name string) string { return map[string]string{"TIMEDB_DSN": serving}[name] }
		code = run(ctx, append([]string{"api", "--port", "0"}, args...), env, strings.NewReader(""), out, s.log)
	}()
	s.stop = func() int {
		cancel()
		s.client.CloseIdleConnections()
		<-done
		return code
	}
	t.Cleanup(func() {
		s.stop()
		owner, _ := mustParse(t, dsn).User.Password()
		if found := secretsOf(s.log.String(), owner); found != "" { // S6
			t.Errorf("the server's log holds %s", found)
		}
	})
	for s.url == "" {
		if found := servesLine.FindStringSubmatch(out.String()); found != nil {
			s.url = found[1]
			break
		}
		select {
		case <-done:
			t.Fatalf("timedb api ended with exit %d: %s", code, s.log)
		case <-time.After(time.Millisecond):
		}
	}
	return s
}

var wholeKey = regexp.MustCompile(`tdb_[a-zA-Z0-9]{8}_[A-Za-z0-9_-]{40}`)

// mustServer starts the API on a database of its own, with users_table.
func mustServer(t testing.TB, args ...string) *testServer {
	t.Helper()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	return mustAPI(t, dsn, args...)
}

// mustUser creates a user on the command line and returns the key.
func (s *testServer) mustUser(t testing.TB, tenant, email string) string {
	t.Helper()
	key, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "-t", tenant, "-e", email)
	return strings.TrimSpace(key)
}

// do sends one request; header lines are "Name: value". A body without Content-Type is JSON. Nothing is retried.
func (s *testServer) do(method, path, key, body string, header ...string) (*http.Response, string, error) {
	r, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			r.Host = value
		} else if name == "X-API-Key" {
			r.Header.Add(name, value)
		} else {
			r.Header.Set(name, value)
		}
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp, string(text), err
}

// must sends one request, which must be answered with the status want, and returns the body.
func (s *testServer) must(t testing.TB, want int, method, path, key, body string, header ...string) string {
	t.Helper()
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if resp.StatusCode != want {
		t.Fatalf("%s %s: status %d, want %d: %s\nrequest: %.2000s", method, path, resp.StatusCode, want, text, body)
	}
	var refusal struct{ Detail string }
	if want >= 400 && method != "HEAD" && (json.Unmarshal([]byte(text), &refusal) != nil || refusal.Detail == "") {
		t.Fatalf("%s %s: status %d without a detail: %q", method, path, want, text)
	}
	return text
}

// httpCase is one request and its answer: the status, and texts that the body must contain.
type httpCase struct {
	method, path, body string
	status             int
	want               []string
}

func (s *testServer) mustAll(t *testing.T, key string, cases []httpCase) {
	t.Helper()
	for _, c := range cases {
		text := s.must(t, c.status, c.method, c.path, key, c.body)
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s %s %.300s: body %q, want %q in it", c.method, c.path, c.body, text, want)
			}
		}
	}
}

// mustRaw sends bytes as they are and returns the first line of the answer.
func (s *testServer) mustRaw(t testing.TB, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go io.WriteString(conn, request) // the server may answer, and close, before it has read all
	answer := make([]byte, 100)
	n, err := io.ReadAtLeast(conn, answer, 15)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	line, _, _ := strings.Cut(string(answer[:n]), "\r\n")
	return line
}

// mustDecode reads a JSON body into a T.
func mustDecode[T any](t testing.TB, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %.500s", err, text)
	}
	return v
}

// stored is how much there is in the three data tables: it tells whether anything was stored.
func (s *testServer) stored(t testing.TB) string {
	t.Helper()
	return mustQuery(t, s.db, `SELECT concat_ws(' ', (SELECT count(*) FROM runs_table), (SELECT count(*) FROM series_table),
		(SELECT count(*) FROM values_table), (SELECT sum(cardinality("values")) FROM values_table))`)
}

// relations lists what is in a schema: tables, views, sequences, indexes and functions.
func relations(t testing.TB, db *sql.DB, schema string) string {
	t.Helper()
	return mustQuery(t, db, `SELECT string_agg(name, ' ' ORDER BY name) FROM (
		SELECT relname::text AS name FROM pg_class WHERE relnamespace = to_regnamespace($1)
		UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace($1)) AS x`, pq.QuoteIdentifier(schema))
}

// users is a digest of all that users_table holds.
func users(t testing.TB, db *sql.DB) string {
	t.Helper()
	return mustQuery(t, db, `SELECT md5(string_agg(u::text, ',' ORDER BY user_id)) FROM users_table u`)
}

func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, text)
	w.Close()
	return b.String()
}

func mustUnzip(t testing.TB, text string) string {
	t.Helper()
	r, err := gzip.NewReader(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

// together calls fn n times at once and waits for all.
func together(n int, fn func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { fn(i) })
	}
	wg.Wait()
}

// ---- Command line

func TestDSNComesFromFlagThenTimedbDSNThenDatabaseURL(t *testing.T) {
	t.Parallel()
	good, bad := mustDatabase(t), "postgresql://u:hunter2@127.0.0.1:1/nowhere"
	for _, c := range []struct {
		flag, timedb, database string
		code                   int
	}{
		{good, bad, bad, 0}, {"", good, bad, 0}, {"", "", good, 0},
		{bad, good, good, 1}, {"", bad, good, 1}, {"", "", bad, 1}, {"", "", "", 2},
	} {
		args := []string{"create", "tables", "-y"}
		if c.flag != "" {
			args = append(args, "--dsn", c.flag)
		}
		code, stdout, stderr := runIn(map[string]string{"TIMEDB_DSN": c.timedb, "DATABASE_URL": c.database}, "", args...)
		if code != c.code {
			t.Errorf("%v: exit %d, want %d: %s", c, code, c.code, stderr)
		}
		if strings.Contains(stdout+stderr, "hunter2") {
			t.Errorf("the password was printed: %s%s", stdout, stderr)
		}
		for _, name := range []string{"ERROR:", "--dsn", "TIMEDB_DSN", "DATABASE_URL"} {
			if c.code == 2 && !strings.Contains(stderr, name) {
				t.Errorf("without a DSN stderr is %q, want %s in it", stderr, name)
			}
		}
	}
}

func TestPasswordOfADSNIsNeverPrinted(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgresql://u:hunter2@127.0.0.1:1/db", "postgresql://u:hunter2@x@127.0.0.1:1/db", "postgresql://u:x@hunter2@127.0.0.1:1/db",
		"postgresql://u:hunter2/x@127.0.0.1:1/db", "postgresql://u:x/hunter2@127.0.0.1:1/db", "postgresql://u:hunter2?x@127.0.0.1:1/db",
		"postgresql://u:x?hunter2@127.0.0.1:1/db", "postgresql://u:hunter2#x@127.0.0.1:1/db", "postgresql://u:x#hunter2@127.0.0.1:1/db",
		"postgresql://localhost:1/hunter2@127.0.0.1:1/db", "postgresql://localhost:1?hunter2@127.0.0.1:1/db",
		"postgresql://localhost:1#hunter2@127.0.0.1:1/db", "postgresql://u:%zzhunter2@127.0.0.1:1/db",
		"postgresql://u:hunter2@127.0.0.1:port/db",
		"postgresql://u:hunter2@127.0.0.1:1/db?sslmode=perhaps", "postgresql://u:hunter2@127.0.0.1:1/db?connect_timeout=soon",
		"postgresql://u:hunter2@[::1/db", "postgresql://u:hunter2 x@127.0.0.1:1/db", "postgresql://u:hunter2\n@127.0.0.1:1/db",
		"hunter2", "host=127.0.0.1 port=1 password='hunter2", "host=127.0.0.1 port=x password=hunter2", "password = hunter2 port",
		"host=127.0.0.1 port=1 password=x hunter2", "postgresql://u:x@127.0.0.1:1/db?password=hunter2&port=x",
		"mysql://u:hunter2@127.0.0.1:1/db",
	} {
		for _, args := range [][]string{{"users", "list"}, {"api", "--port", "0"}} {
			code, stdout, stderr := runIn(map[string]string{"DATABASE_URL": dsn}, "", args...)
			if code == 0 || strings.Contains(stdout+stderr, "hunter2") {
				t.Errorf("DSN %q: exit %d, printed %q", dsn, code, stdout+stderr)
			}
		}
	}
}

func TestMisplacedDSNIsNotRepeated(t *testing.T) {
	t.Parallel()
	const dsn = "postgresql://u:hunter2@127.0.0.1:1/db"
	for _, args := range [][]string{{"-d", dsn, "api"}, {"create", "tables", dsn}, {"create", "tables", "-d" + dsn}, {dsn},
		{"api", "--port", "postgresql://127.0.0.1:1/db?password=hunter2"}} {
		code, stdout, stderr := runIn(nil, "", args...)
		if code != 2 || stderr == "" || strings.Contains(stdout+stderr, "hunter2") {
			t.Errorf("%q: exit %d, printed %q", args, code, stdout+stderr)
		}
	}
}

func TestPasswordMayStandInAFile(t *testing.T) { // S29
	dsn := mustDatabase(t)
	u := mustParse(t, dsn)
	password, _ := u.User.Password()
	file := filepath.Join(t.TempDir(), "pgpass")
	if err := os.WriteFile(file, []byte("*:*:*:*:"+password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PGPASSFILE", file)
	u.User = url.User(u.User.Username())
	mustRun(t, 0, u.String(), "", "create", "tables", "-y")
	t.Setenv("PGPASSFILE", filepath.Join(t.TempDir(), "none"))
	if password != "" {
		mustRun(t, 1, u.String(), "", "create", "tables", "-y")
	}
	for _, word := range []string{"ps", "TIMEDB_DSN", "PGPASSFILE"} {
		if !strings.Contains(usage, word) {
			t.Errorf("the help does not tell of %s", word)
		}
	}
}

func TestWrongUsageIsNamed(t *testing.T) {
	t.Parallel()
	const dsn, tenant = "postgresql://u:hunter2@127.0.0.1:1/db", "aaaaaaaa-0000-4000-8000-00000000000a"
	for want, args := range map[string][]string{
		"--email: expected":     {"users", "create", "-d", dsn, "-t", tenant, "-e", "nonsense"},
		"--email is required":   {"users", "create", "-d", dsn, "-t", tenant},
		"--tenant-id: expected": {"users", "create", "-d", dsn, "-t", "x", "-e", "a@example.com"},
		"-nope":                 {"users", "list", "--nope"},
		`"nope"`:                {"users", "list", "nope"},
		"unknown command":       {"nope"},
		"DATABASE_URL":          {"users", "list"},
	} {
		if code, _, stderr := runIn(nil, "", args...); code != 2 || !strings.Contains(stderr, want) {
			t.Errorf("%q: exit %d, printed %q, want 2 and %q", args, code, stderr, want)
		}
	}
}

func TestNotebookDSNShapesAreUnderstood(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	bare, _, _ := strings.Cut(dsn, "?")
	for _, shape := range []string{bare, bare + "?sslmode=prefer&application_name=notebook",
		strings.Replace(bare, "postgresql:", "postgres:", 1)} {
		mustRun(t, 0, shape, "", "create", "tables", "-y")
	}
}

func TestExitCodeOfWrongUsageIsTwo(t *testing.T) {
	t.Parallel()
	const down = "postgresql://u:p@127.0.0.1:1/db" // wrong usage is found before the database is looked for
	for _, line := range []string{
		"nonsense", "create", "users", "tables create", "users nonsense", "help nonsense", "version stray", "version --nope",
		"create tables --nope", "create tables stray", "create tables --app-role", "delete tables --with-users", "users list stray",
		"users create", "users create -e a@example.com", "users create -t " + tenantA, "users create -t nope -e a@example.com",
		"users create -t " + tenantA + "0 -e a@example.com", "users create -e= -t " + tenantA, "users create -t= -e a@example.com",
		"users create -e nonsense -t " + tenantA,
		"users list -t nope", "users deactivate", "users deactivate -e=", "users activate", "users activate -e a@example.com -t nope",
		"users regenerate-key", "api --port x", "api stray",
	} {
		mustRun(t, 2, down, "", strings.Fields(line)...)
	}
	for _, email := range []string{" ", "a@", "@example.com", "@", "a\nb@example.com", "a@example.com\x1b[2J", "a@exa\xffmple.com"} {
		mustRun(t, 2, down, "", "users", "create", "-t", tenantA, "-e", email)
	}
}

func TestHelpAndVersionNeedNoDatabase(t *testing.T) {
	t.Parallel()
	for command, flags := range map[string]string{
		"create tables": "-dsn -with-users -schema -app-role -dry-run -yes", "delete tables": "-dsn -schema -yes",
		"users create": "-dsn -tenant-id -email -q", "users list": "-dsn -tenant-id -include-inactive -json",
		"users deactivate": "-dsn -email -tenant-id -yes", "users activate": "-dsn -email -tenant-id",
		"users regenerate-key": "-dsn -email -tenant-id -q -yes",
		"api":                  "-dsn -schema -host -port -require-auth -allow-anonymous",
	} {
		for _, line := range []string{"help " + command, command + " -h", command + " --help"} {
			stdout, _ := mustRun(t, 0, "", "", strings.Fields(line)...)
			for _, name := range strings.Fields(flags) {
				if !strings.Contains(stdout, name) {
					t.Errorf("timedb %s: %s is not in the help", line, name)
				}
			}
		}
	}
	// The manual has a section on each command, with just the flags that it takes and an example that is right usage.
	manual := map[string]bool{"version": true}
	for _, section := range strings.Split(usage, "\n== ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		manual[name] = true
		i := slices.IndexFunc(commands, func(cmd command) bool { return cmd.name == name })
		if i < 0 || !strings.Contains(usage, "\n  timedb "+name+" ") {
			t.Fatalf("the manual tells of %q, or its overview does not", name)
		}
		c := &cli{command: commands[i], env: func(string) string { return "postgresql://h/d" }}
		taken, told := "", ""
		c.flags().VisitAll(func(f *flag.Flag) { taken += " -" + f.Name })
		for _, line := range strings.Split(text, "\n") {
			for _, word := range strings.Fields(line) {
				if strings.HasPrefix(strings.TrimSpace(line), "-") && strings.HasPrefix(word, "-") {
					told += " -" + strings.Trim(word, "-,")
				}
			}
			if example, is := strings.CutPrefix(line, "example: timedb "); is && (c.parse(strings.Fields(example)) != nil || c.check() != nil) {
				t.Errorf("the manual's example %q is wrong usage", line)
			}
		}
		words := strings.Fields(told)
		if slices.Sort(words); strings.Join(words, " ") != strings.TrimSpace(taken) || name != "version" && !strings.Contains(text, "\nexample: ") {
			t.Errorf("%s takes%s, the manual tells of %q", name, taken, words)
		}
	}
	for _, cmd := range commands {
		if !manual[cmd.name] {
			t.Errorf("the manual does not tell of %q", cmd.name)
		}
	}
	for _, line := range []string{"help", "-h", "--help"} {
		if stdout, _ := mustRun(t, 0, "", "", line); !strings.Contains(stdout, "users regenerate-key") {
			t.Errorf("timedb %s does not list the commands: %s", line, stdout)
		}
	}
	if stdout, _ := mustRun(t, 0, "", "", "version"); !strings.HasPrefix(stdout, "timedb ") {
		t.Errorf("timedb version prints %q", stdout)
	}
}

func TestCreateTablesMayBeRepeatedAndRunConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	together(4, func(int) {
		if code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", "create", "tables", "-y", "--with-users",
			"--app-role", appRole.name); code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
	})
	db := mustOpen(t, dsn)
	before := relations(t, db, "public")
	stdout, _ := mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users")
	if !strings.Contains(stdout, "values_table") {
		t.Errorf("it does not report what it did: %q", stdout)
	}
	if after := relations(t, db, "public"); after != before {
		t.Errorf("repeating it changed %q to %q", before, after)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	if left := relations(t, db, "public"); left != "" {
		t.Errorf("delete tables left %q", left)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
}

func TestNewSchemaMayBeCreatedConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	together(4, func(int) {
		if code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", "create", "tables", "-y", "-s", "new one"); code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
	})
	db := mustOpen(t, dsn)
	if relations(t, db, "new one") == "" {
		t.Error("nothing was created")
	}
	mustExec(t, db, `DROP SCHEMA public`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y") // which makes the schema anew, and nothing temporary
	if relations(t, db, "public") == "" {
		t.Error("nothing was created in public")
	}
}

func TestTablesOfAnEarlierVersionAreUpgradedInPlace(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	s := mustAPI(t, dsn)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1")))
	before := s.must(t, 200, "GET", "/values?detail=true", key, "")
	s.stop()
	// Version 1 had no comment, another compression, and users without a grace.
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS NULL; ALTER TABLE values_table ALTER "values" SET COMPRESSION pglz;
		ALTER TABLE users_table DROP previous_digest, DROP previous_ends_at`)
	if _, errs := mustRun(t, 1, dsn, "", "api", "--port", "0"); !strings.Contains(errs, "version 1") || !strings.Contains(errs, "run timedb create tables") {
		t.Errorf("api on tables of version 1: %q", errs)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() { mustRun(t, 0, dsn, "", "create", "tables", "-y") })
	}
	all.Wait()
	mustCreateTables(t, dsn)
	if after := mustAPI(t, dsn).must(t, 200, "GET", "/values?detail=true", key, ""); after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	if got := mustQuery(t, s.db, `SELECT attcompression FROM pg_attribute WHERE attrelid = 'values_table'::regclass AND attname = 'values'`); got != "l" {
		t.Errorf("the compression is %q, want l of lz4", got)
	}
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS 'timedb schema 99'`)
	for _, command := range []string{"api --port 0", "create tables -y"} {
		if _, errs := mustRun(t, 1, dsn, "", strings.Fields(command)...); !strings.Contains(errs, "version 99") || !strings.Contains(errs, "the timedb that made them") {
			t.Errorf("%s on tables of a later version: %q", command, errs)
		}
	}
}

func TestCitusIsAskedForByName(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	if _, errs := mustRun(t, 1, dsn, "", "create", "tables", "--citus", "-y"); !strings.Contains(errs, "CREATE EXTENSION citus") {
		t.Errorf("without the extension: %q", errs)
	}
	if got := mustQuery(t, mustOpen(t, dsn), "SELECT count(*) FROM pg_class WHERE relname LIKE '%_table' AND relnamespace = 'public'::regnamespace"); got != "0" {
		t.Errorf("%s tables were made by a command that failed", got)
	}
}

func TestDryRunPrintsSQLThatWorks(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	script, _ := mustRun(t, 0, "", "", "create", "tables", "--dry-run", "--with-users", "--app-role", appRole.name, "-s", "dry run")
	db := mustOpen(t, dsn)
	if got := relations(t, db, "dry run"); got != "" {
		t.Fatalf("--dry-run created %q", got)
	}
	mustExec(t, db, script)
	mustExec(t, db, script)
	printed := relations(t, db, "dry run")
	mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "-s", "really")
	if did := relations(t, db, "really"); did != printed || printed == "" {
		t.Errorf("--dry-run makes %q, create tables makes %q", printed, did)
	}
	s := mustAPI(t, dsn, "--schema", "dry run")
	s.must(t, 401, "GET", "/values", "", "")
}

func TestSchemaHoldsEverythingAndNothingElseIsDeleted(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	const schema = `Wind "Nord"` // needs quoting
	mustCreateTables(t, dsn, "--with-users", "--schema", schema)
	if got := relations(t, db, "public"); got != "" {
		t.Errorf("in public there is %q", got)
	}
	mustExec(t, db, `CREATE TABLE "Wind ""Nord""".mine (x int); CREATE VIEW "Wind ""Nord""".my_view AS SELECT 1 AS one`)
	s := mustAPI(t, dsn, "-s", schema)
	s.must(t, 401, "GET", "/values", "", "")
	mustCreateTables(t, dsn, "--with-users") // the same in public must survive too
	public := relations(t, db, "public")
	mustRun(t, 0, dsn, "", "delete", "tables", "-y", "-s", schema)
	if got := relations(t, db, schema); got != "mine my_view" {
		t.Errorf("after delete tables the schema holds %q", got)
	}
	if got := relations(t, db, "public"); got != public {
		t.Errorf("delete tables in a schema changed public to %q", got)
	}
}

func TestDeleteTablesRefusesToTakeForeignObjectsAlong(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustExec(t, db, `CREATE VIEW report AS SELECT count(*) FROM values_table`)
	before := relations(t, db, "public")
	mustRun(t, 1, dsn, "", "delete", "tables", "-y")
	if got := relations(t, db, "public"); got != before {
		t.Errorf("a view that uses values_table: %q became %q", before, got)
	}
}

func TestCreateWithoutUsersLeavesUsersTableAlone(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustExec(t, db, `CREATE TABLE users_table (x int)`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	if got := mustQuery(t, db, `SELECT string_agg(attname, ' ') FROM pg_attribute WHERE attrelid = 'users_table'::regclass AND attnum > 0`); got != "x" {
		t.Errorf("the columns of users_table became %q", got)
	}
}

func TestQuestionsAreAskedAndOnlyYesIsYes(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	user := []string{"-e", "ask@example.com"}
	for _, c := range []struct {
		args  []string
		state func() string
	}{
		{[]string{"create", "tables", "--with-users"}, func() string { return relations(t, db, "public") }},
		{append([]string{"users", "regenerate-key"}, user...), func() string { return users(t, db) }},
		{append([]string{"users", "deactivate"}, user...), func() string { return users(t, db) }},
		{[]string{"delete", "tables"}, func() string { return relations(t, db, "public") }},
	} {
		before := c.state()
		for _, answer := range []string{"", "n\n", "\n", "perhaps\n"} {
			_, stderr := mustRun(t, 1, dsn, answer, c.args...)
			if answer == "" && !strings.Contains(stderr, "-y") {
				t.Errorf("%v with nobody to ask says %q, want -y in it", c.args, stderr)
			}
			if c.state() != before {
				t.Fatalf("%v with the answer %q changed something", c.args, answer)
			}
		}
		if mustRun(t, 0, dsn, "y\n", c.args...); c.state() == before {
			t.Errorf("%v with the answer y changed nothing", c.args)
		}
		if c.args[0] == "create" {
			mustRun(t, 0, dsn, "", append([]string{"users", "create", "-t", tenantA}, user...)...)
		}
	}
}

func TestUsersCreateShowsTheKeyOnce(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "early@example.com") // no users_table yet
	mustCreateTables(t, dsn, "--with-users")
	stdout, _ := mustRun(t, 0, dsn, "", "users", "create", "--tenant-id", strings.ToUpper(tenantA), "--email", "Alice@example.com")
	found := regexp.MustCompile(`(?m)^API Key: (tdb_\S+)$`).FindStringSubmatch(stdout)
	if found == nil || !wellFormedKey(found[1]) {
		t.Fatalf("no line of the key alone: %q", stdout)
	}
	db := mustOpen(t, dsn)
	for _, want := range []string{mustQuery(t, db, `SELECT user_id FROM users_table`), tenantA, "Alice@example.com",
		"not be shown again"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("users create prints %q, want %q in it", stdout, want)
		}
	}
	_, stderr := mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "aLICE@example.com")
	if !strings.Contains(stderr, "User with email 'aLICE@example.com' already exists for this tenant.") {
		t.Errorf("a second user of one email: %q", stderr)
	}
	quiet, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantB, "-e", "Alice@example.com")
	if !wellFormedKey(strings.TrimSuffix(quiet, "\n")) {
		t.Errorf("-q prints %q, want the key alone", quiet)
	}
	dump := mustQuery(t, db, `SELECT string_agg(u::text, ' ') FROM users_table u`) // S6
	for _, key := range []string{found[1], strings.TrimSpace(quiet)} {
		if strings.Contains(dump, key[13:]) || strings.Contains(dump, hex.EncodeToString([]byte(key[13:]))) {
			t.Errorf("users_table holds the key: %s", dump)
		}
	}
}

func TestAmbiguousOrUnknownEmailChangesNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	for _, tenant := range []string{tenantA, tenantB} {
		mustRun(t, 0, dsn, "", "users", "create", "-t", tenant, "-e", "both@example.com")
	}
	db := mustOpen(t, dsn)
	before := users(t, db)
	for _, command := range []string{"deactivate -y", "activate", "regenerate-key -y"} {
		args := append([]string{"users"}, strings.Fields(command)...)
		_, stderr := mustRun(t, 1, dsn, "", append(args, "-e", "both@example.com")...)
		for _, want := range []string{tenantA, tenantB, "--tenant-id"} {
			if !strings.Contains(stderr, want) {
				t.Errorf("users %s: %q, want %s in it", command, stderr, want)
			}
		}
		mustRun(t, 1, dsn, "", append(args, "-e", "nobody@example.com")...)
		mustRun(t, 1, dsn, "", append(args, "-e", "both@example.com", "-t", nobody)...)
		if users(t, db) != before {
			t.Fatalf("users %s changed something", command)
		}
	}
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "BOTH@example.com", "-t", tenantB)
	if got := mustQuery(t, db, `SELECT tenant_id FROM users_table WHERE NOT is_active`); got != tenantB {
		t.Errorf("deactivated %q, want the user of tenant B", got)
	}
}

func TestUsersListShowsEveryUserAndNoSecret(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	var secrets []string
	for _, email := range []string{"on@example.com", "off@example.com"} {
		key, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantA, "-e", email)
		digest := sha256.Sum256([]byte(strings.TrimSpace(key)))
		secrets = append(secrets, key[13:50], hex.EncodeToString(digest[:]), base64.StdEncoding.EncodeToString(digest[:]))
	}
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantB, "-e", "other@example.com")
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "off@example.com")
	db := mustOpen(t, dsn)
	ids := strings.Fields(mustQuery(t, db, `SELECT string_agg(user_id || ' ' || key_id, ' ') FROM users_table WHERE tenant_id = $1`, tenantA))
	for _, flags := range []string{"", "--json", "--include-inactive", "-t " + tenantA, "--json -t " + tenantA} {
		stdout, _ := mustRun(t, 0, dsn, "", append([]string{"users", "list"}, strings.Fields(flags)...)...)
		for _, want := range append(ids, tenantA, "on@example.com", "off@example.com") {
			if !strings.Contains(stdout, want) {
				t.Errorf("users list %s: no %q in\n%s", flags, want, stdout)
			}
		}
		for _, secret := range secrets {
			if strings.Contains(stdout, secret) {
				t.Errorf("users list %s shows a key or a digest:\n%s", flags, stdout)
			}
		}
		if strings.Contains(stdout, "other@example.com") == strings.Contains(flags, "-t") {
			t.Errorf("users list %s does not respect the tenant:\n%s", flags, stdout)
		}
		if strings.Contains(flags, "--json") {
			for _, u := range mustDecode[[]map[string]any](t, stdout) {
				if u["is_active"] != (u["email"] != "off@example.com") {
					t.Errorf("is_active is wrong: %v", u)
				}
			}
		}
	}
}

func TestAppRoleCannotRewriteAnything(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	s.mustUser(t, tenantA, "a@example.com")
	app := mustOpen(t, asAppRole(s.dsn))
	forbidden := []string{`SELECT created_at FROM users_table`, `SELECT * FROM users_table`, `DELETE FROM users_table`,
		`TRUNCATE users_table`,
		`INSERT INTO users_table (tenant_id, email, key_id, key_digest) VALUES (gen_random_uuid(), 'x', 'x', sha256('x'))`,
		`ALTER TABLE values_table ADD x int`, `DROP TABLE values_table`,
		`CREATE TRIGGER x BEFORE INSERT ON runs_table EXECUTE FUNCTION suppress_redundant_updates_trigger()`}
	columns := mustQuery(t, s.db, `SELECT string_agg(attname, ' ') FROM pg_attribute
		WHERE attrelid = 'users_table'::regclass AND attnum > 0 AND NOT attisdropped AND attname <> 'last_used_at'`)
	for _, column := range strings.Fields(columns) {
		forbidden = append(forbidden, `UPDATE users_table SET `+column+` = DEFAULT`)
	}
	for _, table := range []string{"runs_table", "series_table", "values_table"} {
		forbidden = append(forbidden, `UPDATE `+table+` SET tenant_id = tenant_id`, `DELETE FROM `+table, `TRUNCATE `+table+` CASCADE`)
	}
	for _, query := range forbidden {
		if _, err := app.Exec(query); pq.As(err) == nil || pq.As(err).Code != "42501" {
			t.Errorf("%s as the API's role: %v, want permission denied", query, err)
		}
	}
	mustExec(t, app, `UPDATE users_table SET last_used_at = now() WHERE email = 'a@example.com'`)
}

func TestAPIRefusesToStartUnsafely(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	_, stderr := mustRun(t, 1, asAppRole(dsn), "", "api", "--host", "0.0.0.0", "--port", "0")
	if !strings.Contains(stderr, "--allow-anonymous") {
		t.Errorf("a network without users_table: %q", stderr)
	}
	mustRun(t, 1, "postgresql://u:p@127.0.0.1:1/db", "", "api", "--port", "0") // the database is down
	mustAPI(t, dsn, "--host", "0.0.0.0", "--allow-anonymous")
	mustCreateTables(t, dsn, "--with-users")
	// The operator is told what weakens the protection, and of nothing else.
	cert, key := mustCertificate(t)
	for args, weakness := range map[string]string{"--host 127.0.0.1": "", "--host 0.0.0.0": "plain text", "--host 0.0.0.0 --tls-cert " + cert + " --tls-key " + key: ""} {
		s := mustAPI(t, dsn, strings.Fields(args)...)
		if log := s.log.String(); strings.Contains(log, "level=WARN") != (weakness != "") || !strings.Contains(log, weakness) {
			t.Errorf("started with %s the log is %q, want %q in it", args, log, weakness)
		}
	}
	for _, grant := range []string{`UPDATE (annotation) ON values_table`, `DELETE ON runs_table`, `INSERT ON users_table`} {
		mustExec(t, mustOpen(t, dsn), `GRANT `+grant+` TO `+appRole.name)
		if s := mustAPI(t, dsn); !strings.Contains(s.log.String(), "may rewrite") {
			t.Errorf("the role has %s, and nothing is said", grant)
		}
		mustExec(t, mustOpen(t, dsn), `REVOKE `+grant+` FROM `+appRole.name)
	}
	ctx, cancel := context.WithCancel(context.Background())
	owner := func(name string) string { return map[string]string{"TIMEDB_DSN": dsn}[name] }
	var out, log logBuffer
	done := make(chan int)
	go func() { done <- run(ctx, []string{"api", "--port", "0"}, owner, strings.NewReader(""), &out, &log) }()
	for !servesLine.MatchString(out.String()) {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if code := <-done; code != 0 || !strings.Contains(log.String(), "may rewrite") { // S19
		t.Errorf("started as the tables' owner: exit %d, the log is %q", code, log.String())
	}
	mustRun(t, 2, dsn, "", "api", "--tls-cert", cert)
	mustRun(t, 1, asAppRole(dsn), "", "api", "--port", "0", "--tls-cert", key, "--tls-key", cert)
}

func TestUnverifiedConnectionsToTheDatabaseAreKnown(t *testing.T) { // S28
	t.Parallel()
	for dsn, exposed := range map[string]bool{
		"postgresql://u@127.0.0.1/d": false, "postgresql://u@localhost/d?sslmode=disable": false, "postgresql://u@[::1]/d": false, "host=/run/postgresql user=u": false,
		"postgresql://u@db.example/d?sslmode=verify-full": false, "postgresql://u@db.example/d": true, "postgresql://u@db.example/d?sslmode=require": true,
		"postgresql://u@192.0.2.1/d?sslmode=disable": true, "postgresql://u@127.0.0.1.example/d": true, "host=db.example user=u sslmode=verify-ca": true,
	} {
		st, err := openStore(dsn, "public", 0, 1)
		if err != nil || st.exposed != exposed {
			t.Errorf("%s: exposed is not %v, or %v", dsn, exposed, err)
			continue
		}
		st.db.Close()
	}
}

// mustCertificate makes a certificate of 127.0.0.1 and its key, in files.
func mustCertificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	signed, err := x509.CreateCertificate(cryptorand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: signed}, key: {Type: "PRIVATE KEY", Bytes: encoded}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestTLSIsSpokenFromVersion12On(t *testing.T) { // S28
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	cert, private := mustCertificate(t)
	s := mustAPI(t, dsn, "--tls-cert", cert, "--tls-key", private)
	key := s.mustUser(t, tenantA, "a@example.com")
	if !strings.HasPrefix(s.url, "https://") {
		t.Errorf("it serves %s", s.url)
	}
	trusted := x509.NewCertPool()
	if roots, err := os.ReadFile(cert); err != nil || !trusted.AppendCertsFromPEM(roots) {
		t.Fatal("the certificate cannot be read")
	}
	for version, works := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted, MinVersion: version, MaxVersion: version}}}
		resp, _, err := s.do("GET", "/list_timeseries", key, "")
		if works != (err == nil && resp.StatusCode == 200) {
			t.Errorf("%s: %v %v", tls.VersionName(version), resp, err)
		}
	}
	plain, err := http.Get(strings.Replace(s.url, "https", "http", 1) + "/values")
	if err != nil || plain.StatusCode != 400 {
		t.Errorf("plain HTTP on the same port: %v %v", plain, err)
	}
}

func TestMissingTablesAre503UntilTheyAreCreated(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	s := mustAPI(t, dsn)
	for _, c := range [][3]string{{"GET", "/values", ""}, {"GET", "/list_timeseries", ""}, {"POST", "/upload", oneValue},
		{"PUT", "/values", `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":1}]}`}, {"POST", "/series", `{"name":"x"}`}} {
		if text := s.must(t, 503, c[0], c[1], "", c[2]); strings.Contains(text, "table") {
			t.Errorf("%s %s tells of the database: %s", c[0], c[1], text)
		}
	}
	mustCreateTables(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	s.must(t, 200, "GET", "/values", "", "")
}

// ---- Authentication

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

const (
	noKey  = `{"detail":"API key required. Please provide X-API-Key header."}` + "\n"
	badKey = `{"detail":"Invalid or inactive API key."}` + "\n"
)

// minimal requests that succeed for a key that may do them.
const (
	emptyRun = `{"run_start_time":"2025-01-01T00:00:00Z","value_rows":[]}`
	oneValue = `{"run_start_time":"2025-01-01T00:00:00Z","known_time":"2025-01-01T00:00:00Z","value_rows":[
		{"valid_time":"2025-01-01T00:00:00Z","value_key":"load","value":1}]}`
)

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

func TestPageRunsNothingButItsOwnScript(t *testing.T) { // script/browser sees that browsers mind it
	t.Parallel()
	s := mustServer(t)
	resp, page, err := s.do("GET", "/docs", "", "")
	if err != nil || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatal(resp, err)
	}
	policy := resp.Header.Get("Content-Security-Policy")
	for _, tag := range []string{"script", "style"} {
		if strings.Count(page, "<"+tag) != 1 || strings.Count(page, "</"+tag+">") != 1 {
			t.Errorf("there is not just one <%s>", tag)
		}
		_, inline, _ := strings.Cut(page, "<"+tag+">")
		inline, _, _ = strings.Cut(inline, "</"+tag+">")
		digest := sha256.Sum256([]byte(inline))
		if want := fmt.Sprintf("; %s-src 'sha256-%s'", tag, base64.StdEncoding.EncodeToString(digest[:])); !strings.Contains(policy, want) || inline == "" {
			t.Errorf("the policy %q lacks %q", policy, want)
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none'; ") || strings.Contains(policy, "unsafe") || !strings.Contains(policy, "frame-ancestors 'none'") {
		t.Errorf("the policy is %q", policy)
	}
	if found := regexp.MustCompile(`innerHTML|insertAdjacentHTML|document\.write|eval\(|\bsrc=|Storage|https?://`).FindString(
		strings.ReplaceAll(page, "http://www.w3.org/2000/svg", "")); found != "" {
		t.Errorf("the page has %q", found)
	}
}

func TestKnownPathsAnswerOtherMethodsWithAllow(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for path, allow := range map[string]string{
		"/upload": "POST", "/values": "GET PUT", "/series": "POST", "/list_timeseries": "GET", "/": "GET", "/docs": "GET",
	} {
		resp, _, err := s.do("DELETE", path, key, "")
		if err != nil || resp.StatusCode != 405 {
			t.Errorf("DELETE %s: %v, %v, want 405", path, resp, err)
			continue
		}
		for _, method := range strings.Fields(allow) {
			if !strings.Contains(resp.Header.Get("Allow"), method) {
				t.Errorf("DELETE %s: Allow %q, want %s in it", path, resp.Header.Get("Allow"), method)
			}
		}
	}
	for _, path := range []string{"/nope", "/values/x", "/VALUES"} {
		s.must(t, 404, "GET", path, key, "")
	}
}

func TestRootAndHealthNeedNoKey(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	root := mustDecode[map[string]any](t, s.must(t, 200, "GET", "/", "", ""))
	if root["name"] != "TimeDB API" {
		t.Errorf("name is %v", root["name"])
	}
	for _, field := range []string{"version", "description", "endpoints", "authentication", "admin_note"} {
		if root[field] == nil {
			t.Errorf("GET / has no %s", field)
		}
	}
	words := map[string]string{"open": "open", "read": "needs an API key", "write": "needs an API key that may write"}
	endpoints := map[string]any{}
	for _, rt := range (&server{}).routes() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = words[rt.access]
	}
	if !reflect.DeepEqual(root["endpoints"], any(endpoints)) || root["version"] != release {
		t.Errorf("GET / tells of version %v and %v; the routes are %v", root["version"], root["endpoints"], endpoints)
	}
	if how, _ := root["authentication"].(map[string]any); how["header"] != "X-API-Key" || how["method"] == nil || how["note"] == nil {
		t.Errorf("authentication is %v", how)
	}
	if text := s.must(t, 200, "GET", "/healthz", "", ""); strings.TrimSpace(text) != `{"status":"ok"}` {
		t.Errorf("GET /healthz: %q", text)
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

func TestHeadersOver16KiBAreRefused(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	for size, want := range map[int]string{15 << 10: " 401 ", 17 << 10: " 431 ", 200 << 10: " 431 "} {
		request := "GET /values HTTP/1.1\r\nHost: x\r\nX-Padding: " + strings.Repeat("p", size) + "\r\n\r\n"
		if line := s.mustRaw(t, request); !strings.Contains(line, want) {
			t.Errorf("a header of %d bytes: %q, want %s", size, line, want)
		}
	}
}

func TestBugIsA500ThatExplainsNothing(t *testing.T) { // S11, S25
	var log logBuffer
	absent := func(context.Context) (bool, error) { return false, nil }
	s := httptest.NewServer(newServer(nil, nil, &authenticator{usersTableExists: absent}, slog.New(slog.NewTextHandler(&log, nil))))
	defer s.Close()
	resp, err := http.Get(s.URL + "/list_timeseries") // without a store the handler panics
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 500 || string(body) != `{"detail":"Internal server error."}`+"\n" || !strings.Contains(log.String(), "nil pointer") {
		t.Errorf("a panic: %v %q, log %q", resp, body, log.String())
	}
}

func TestSlowReaderIsCutOff(t *testing.T) { // S20
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustManyValues(t, s, key, 250_000)
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET /values HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n\r\n", key)
	for wait := 0; !strings.Contains(s.log.String(), "broken=true"); wait++ {
		if wait > 1200 {
			t.Fatal("a client that does not read its answer is served for ever")
		}
		time.Sleep(100 * time.Millisecond)
	}
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

// As many clients as there are places for large requests read slowly, or send slowly: one more of their kind is told so at
// once, and small requests are served.
func TestLargeRequestsLeaveRoomForSmallOnes(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustManyValues(t, s, key, 400_000)
	address := strings.TrimPrefix(s.url, "http://")
	var held []net.Conn
	hold := func(request string) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.(*net.TCPConn).SetReadBuffer(4 << 10)
		io.WriteString(conn, request)
		held = append(held, conn)
	}
	header := "Host: x\r\nX-API-Key: " + key + "\r\n"
	read := "GET /values HTTP/1.1\r\n" + header + "\r\n" // whose answer is never read
	for range maxLarge / 2 {
		hold(read)
		hold(fmt.Sprintf("POST /upload HTTP/1.1\r\n%sContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s",
			header, 3*largeBody, "{"+strings.Repeat(" ", 2*largeBody+1)))
	}
	refused := func() bool { // a read with lead counts as large, however little it answers
		resp, _, err := s.do("GET", "/values?lead=1h&limit=1", key, "")
		return err == nil && resp.StatusCode == 503 && resp.Header.Get("Retry-After") != ""
	}
	for !refused() { // this question may have had the place of one of them
		hold(read)
	}
	if resp, _, err := s.do("POST", "/upload", key, runWith("", at("2030-01-01", "1"))+strings.Repeat(" ", 2*largeBody)); err != nil || resp.StatusCode != 503 {
		t.Errorf("a large body beside them: %v %v, want 503", resp, err)
	}
	if resp, _, err := s.do("POST", "/upload", key, gzipped(runWith("", at("2030-01-01", "1"))+strings.Repeat(" ", 2*largeBody)), "Content-Encoding: gzip"); err != nil || resp.StatusCode != 503 {
		t.Errorf("a body that is large once unpacked: %v %v, want 503", resp, err)
	}
	for path, body := range map[string]string{"/values?bucket=P1D&agg=sum": "", "/values?lead=1h&limit=1": "", "/values": update(`"value":1`)} {
		method := map[bool]string{true: "GET", false: "PUT"}[body == ""]
		if resp, _, err := s.do(method, path, key, body); err != nil || resp.StatusCode != 503 {
			t.Errorf("%s %s: %v %v, want 503", method, path, resp, err)
		}
	}
	for range 20 {
		s.must(t, 200, "GET", "/values?limit=10", key, "")
		s.must(t, 200, "POST", "/series", key, `{"name":"small"}`)
		s.must(t, 200, "POST", "/upload", key, oneValue)
		s.must(t, 200, "GET", "/healthz", "", "")
	}
	for _, conn := range held {
		conn.Close()
	}
	for refused() { // and then there is room again
		time.Sleep(time.Millisecond)
	}
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2030-01-02", "1"))+strings.Repeat(" ", 2*largeBody))
}

// encoding/json goes on with what it has buffered when an error comes with bytes: a body must not be read on to its end so.
func TestRefusedLargeBodyIsNotDecodedToItsEnd(t *testing.T) { // S23
	json, csv := uploadBodies(400_000)
	for kind, text := range map[string]string{"application/json": json, "text/csv": csv} {
		var large atomic.Int64
		large.Store(maxLarge)
		r := httptest.NewRequest("POST", "/upload", strings.NewReader(text))
		r.Header.Set("Content-Type", kind)
		b := openBody(&response{ResponseWriter: httptest.NewRecorder(), large: &large}, r, kind)
		u := &upload{points: map[seriesRef][]point{}}
		var err error
		if kind == "text/csv" {
			err = u.decodeCSV(b)
		} else {
			err = fields{"run_start_time": new(micros), "value_rows": list(u.add)}.decodeJSON(b)
		}
		if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 503 {
			t.Errorf("%s beyond the limit: %v", kind, err)
		}
		large.Store(0) // a place that is free again is too late for it
		if _, again := b.Read(make([]byte, 1)); again != err {
			t.Errorf("%s: a body that was refused is then read: %v", kind, again)
		}
		if b.size > 2*largeBody || u.rows > 60_000 {
			t.Errorf("%s: %d bytes and %d rows were read of a body that was refused", kind, b.size, u.rows)
		}
	}
}

// Many small things take much more memory than their text: they are refused before they are decoded.
func TestLongListsAreRefusedBeforeTheyAreDecoded(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for path, c := range map[string]struct{ method, body, want string }{
		"/upload": {"POST", `{"run_start_time":"2025-01-01","series_descriptions":{"k":"` + strings.Repeat(`","k":"`, 200_000) + `"},"value_rows":[]}`,
			"series_descriptions: expected at most 1 MiB"},
		"/values": {"PUT", `{"updates":[{"series_key":"load","valid_time":"2025-01-01","tags":["a"` + strings.Repeat(`,"a"`, 300_000) + `]}]}`,
			"updates[0]: expected at most 1 MiB"},
	} {
		if got := s.must(t, 422, c.method, path, key, c.body); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %s, want %s", path, got, c.want)
		}
	}
}

func TestUploadOfTooManySeriesIs422AndStoresNothing(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := []byte("valid_time,value_key,value\n")
	for i := range maxSeries + 1 {
		body = fmt.Appendf(body, "2025-01-01,%d,1\n", i)
	}
	answer := s.must(t, 422, "POST", "/upload?run_start_time=2025-01-01", key, string(body), "Content-Type: text/csv")
	if want := fmt.Sprintf("line[%d].series: expected at most 100000 in one upload", maxSeries+2); !strings.Contains(answer, want) {
		t.Errorf("got %s, want %s", answer, want)
	}
	if n := mustQuery(t, s.db, `SELECT count(*) FROM series_table`); n != "0" {
		t.Errorf("%s series are stored", n)
	}
}

// encoding/json looks through the white space that it has from its beginning each time that it gets more: in small pieces that
// is quadratic, so a body hands on whole pieces, however small those that arrive.
func TestBodyIsHandedOnInWholePieces(t *testing.T) { // S21
	var large atomic.Int64
	r := httptest.NewRequest("POST", "/upload", iotest.OneByteReader(strings.NewReader(strings.Repeat(" ", 2500))))
	r.Header.Set("Content-Type", "text/csv")
	b := openBody(&response{ResponseWriter: httptest.NewRecorder(), large: &large}, r, "text/csv")
	for _, want := range []int{1000, 1000, 500, 0} {
		if n, err := b.Read(make([]byte, 1000)); n != want || (err == io.EOF) != (n == 0) {
			t.Errorf("%d bytes and %v, want %d", n, err, want)
		}
	}
}

// A client that is still sending when its body is refused has to get the answer, not a broken connection.
func TestRefusalReachesAClientThatIsStillSending(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	rows := strings.Repeat(at("2025-01-01", "1")+",", 300_000)
	body := runWith("", at("never", "1"), rows[:len(rows)-1])
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", key, len(body))
	if _, err := io.WriteString(conn, body); err != nil {
		t.Errorf("while sending: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 422" {
		t.Errorf("%q %v", answer, err)
	}
}

// An answer that nobody reads must hold neither a connection to the database nor the place of a request that needs one.
func TestClientsThatDoNotReadKeepNobodyWaiting(t *testing.T) { // S20, S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustExec(t, s.db, `INSERT INTO series_table (tenant_id, series_key, unit)
		SELECT $1, repeat('long ', 80) || i, 'MW' FROM generate_series(1, 40000) AS i`, tenantA)
	for range poolSize + 5 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(4096)
		fmt.Fprintf(conn, "GET /list_timeseries HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n\r\n", key)
		if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // it has begun
			t.Fatal(err)
		}
	}
	s.must(t, 200, "GET", "/values?limit=1", key, "")
}

func TestSlowHeadersKeepNobodyOut(t *testing.T) { // S20
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	var slow []net.Conn
	for range 1000 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /values HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		slow = append(slow, conn)
	}
	for range 20 {
		s.must(t, 200, "GET", "/list_timeseries", key, "")
	}
	for _, conn := range slow { // readHeaderTimeout ends each; without it this would wait for ever
		conn.SetReadDeadline(time.Now().Add(10 * readHeaderTimeout))
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatalf("a connection that never sent its header was kept: %v", err)
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

// ---- Source

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
	for _, file := range []string{"auth.go", "server.go", "store.go", "cli.go", "main.go", "server_test.go"} {
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
			if !declared["server_test.go:"+name] {
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

// ---- Tenancy

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

// ---- Upload

// uploadAnswer is what POST /upload answers.
type uploadAnswer struct {
	RunID     string            `json:"run_id"`
	Message   string            `json:"message"`
	SeriesIDs map[string]string `json:"series_ids"`
	Rows      int               `json:"rows_inserted"`
}

// runWith is an upload of the given rows, with more members before them.
func runWith(more string, rows ...string) string {
	return `{"run_start_time":"2025-01-01T00:00:00Z",` + more + `"value_rows":[` + strings.Join(rows, ",") + `]}`
}

// at is a row of the series load.
func at(validTime, value string, more ...string) string {
	return `{"valid_time":"` + validTime + `","value_key":"load","value":` + value + strings.Join(more, "") + `}`
}

func TestUploadAnswersAndStoresTheRun(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := `{"workflow_id":"day-ahead","run_start_time":"2025-01-01 06:00","run_finish_time":"2025-01-01T06:05:00.25+00:00","known_time":"2025-01-01T07:00:00+01:00",
		"run_params":{"model":"v2","n":[1,2.5]},"series_descriptions":{"load":"Load in MW"},"tenant_id":"` + tenantA + `","value_rows":[
		{"valid_time":"2025-01-02T01:00:00Z","value_key":"load","value":20},{"valid_time":"2025-01-02","value_key":"load","value":null},
		{"valid_time":"2025-01-02T00:00:00Z","valid_time_end":"2025-01-02T01:00:00Z","value_key":"wind","value":-0.5}]}`
	got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, body))
	if got.Message != "Run created successfully" || got.Rows != 3 || len(got.SeriesIDs) != 2 || len(got.RunID) != 36 {
		t.Errorf("POST /upload answers %+v", got)
	}
	runs := s.must(t, 200, "GET", "/runs", key, "")
	for _, want := range []string{`"run_id":"` + got.RunID + `"`, `"workflow_id":"day-ahead"`, `"run_start_time":"2025-01-01T06:00:00+00:00"`,
		`"run_finish_time":"2025-01-01T06:05:00.250000+00:00"`, `"known_time":"2025-01-01T06:00:00+00:00"`, `"changed_by":"a@example.com"`, `"rows":3`, `"inserted_at":"20`} {
		if !strings.Contains(runs, want) {
			t.Errorf("GET /runs: %s, want %s in it", runs, want)
		}
	}
	want := got.RunID + ` day-ahead 2025-01-01 06:00:00 2025-01-01 06:05:00.25 2025-01-01 06:00:00 ` +
		`{"n": [1, 2.5], "model": "v2"} 3 a@example.com`
	if run := mustQuery(t, s.db, `SELECT concat_ws(' ', run_id, workflow_id, run_start_time AT TIME ZONE 'UTC',
		run_finish_time AT TIME ZONE 'UTC', known_time AT TIME ZONE 'UTC', run_params, rows_inserted, changed_by)
		FROM runs_table`); run != want {
		t.Errorf("the run is stored as %s\nwant %s", run, want)
	}
	type entry struct {
		Key         string  `json:"series_key"`
		Description *string `json:"description"`
		Unit        string  `json:"unit"`
	}
	list := mustDecode[map[string]entry](t, s.must(t, 200, "GET", "/list_timeseries", key, ""))
	load, wind := list[got.SeriesIDs["load"]], list[got.SeriesIDs["wind"]]
	if len(list) != 2 || load.Key != "load" || load.Description == nil || *load.Description != "Load in MW" ||
		load.Unit != "dimensionless" || wind.Description != nil {
		t.Errorf("GET /list_timeseries: %+v", list)
	}
	// Without known_time it is the database's now; without workflow_id it is api-workflow.
	before := mustQuery(t, s.db, `SELECT clock_timestamp()`)
	next := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-02", "1"))))
	if next.SeriesIDs["load"] != got.SeriesIDs["load"] {
		t.Error("the same value_key became another series")
	}
	if mustQuery(t, s.db, `SELECT workflow_id FROM runs_table WHERE known_time BETWEEN $1 AND clock_timestamp()`,
		before) != "api-workflow" {
		t.Error("without known_time and workflow_id the run is not as documented")
	}
	for query, want := range map[string]string{"?workflow_id=day-ahead": got.RunID, "?limit=1": next.RunID, "?end_known=2025-01-01T06:00:00Z": "",
		"?start_known=2025-01-01T06:00:00Z&end_known=2025-01-01T06:00:01Z": got.RunID, "?workflow_id=other": ""} {
		text := s.must(t, 200, "GET", "/runs"+query, key, "")
		if n := strings.Count(text, `"run_id"`); want == "" && n != 0 || want != "" && (n != 1 || !strings.Contains(text, want)) {
			t.Errorf("GET /runs%s: %s, want run %q", query, text, want)
		}
	}
	if text := s.must(t, 200, "GET", "/runs", key, ""); strings.Index(text, next.RunID) > strings.Index(text, got.RunID) {
		t.Error("GET /runs does not show the newest known first")
	}
	for _, query := range []string{"?limit=0", "?limit=x", "?nope=1", "?start_known=x", "?start_known=2025-01-02&end_known=2025-01-01"} {
		s.must(t, 422, "GET", "/runs"+query, key, "")
	}
}

func TestBadUploadIsRefusedAndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, other := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantB, "b@example.com")
	seriesA := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key,
		runWith(`"run_id":"`+nobody+`",`, at("2025-01-01", "1")))).SeriesIDs["load"]
	seriesB := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", other, oneValue)).SeriesIDs["load"]
	good := at("2025-02-01T00:00:00Z", "1")
	row := func(members string) string { return runWith("", good, `{`+members+`}`) } // after a good row, to see that all or nothing holds
	before := s.stored(t)
	jsonCases := []struct {
		body   string
		status int
		want   string // in the detail: the field above all
	}{
		{`{`, 422, "body"}, {``, 415, "Content-Type"}, {`[]`, 422, "body"}, {`null`, 422, "body"}, {`"text"`, 422, "body"},
		{`{"run_start_time"`, 422, "early"},
		{runWith("", good) + ` {}`, 422, "body"}, {runWith("", good) + `x`, 422, "body"}, {runWith("", good)[:60], 422, "value_rows"},
		{runWith("", good+","), 422, "value_rows"}, {runWith("", good+"]"), 422, ""},
		{`{"value_rows":[` + good + `]}`, 422, "run_start_time"},
		{`{"run_start_time":null,"value_rows":[` + good + `]}`, 422, "run_start_time"},
		{`{"run_start_time":5,"value_rows":[]}`, 422, "run_start_time"},
		{`{"run_start_time":"yesterday","value_rows":[]}`, 422, "run_start_time"},
		{runWith(`"run_finish_time":"2024-12-31T23:59:59Z",`, good), 422, "run_finish_time"},
		{runWith(`"known_time":"soon",`, good), 422, "known_time"},
		{runWith(`"workflow_id":7,`, good), 422, "workflow_id"}, {runWith(`"workflow_id":" ",`, good), 422, "workflow_id"},
		{runWith(`"workflow_id":"a\u0000b",`, good), 422, "workflow_id"},
		{runWith("\"workflow_id\":\"a\xffb\",", good), 422, "workflow_id"},
		{runWith(`"run_params":[],`, good), 422, "run_params"}, {runWith(`"run_params":"x",`, good), 422, "run_params"},
		{runWith(`"run_params":5,`, good), 422, "run_params"},
		{runWith(`"run_params":{"a":"\u0000"},`, good), 422, "run_params"},
		{runWith(`"run_params":{"a":"\ud800"},`, good), 422, "run_params"},
		{runWith("\"run_params\":{\"a\":\"\xff\"},", good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`{"a":`, 100_000)+`1`+strings.Repeat(`}`, 100_000)+`,`, good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`[`, 9_000)+strings.Repeat(`]`, 9_000)+`,`, good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`{"a":`, 2_500)+`1`+strings.Repeat(`}`, 2_500)+`,"nope":1,`, good), 422, "nope"},
		{runWith(`"series_descriptions":[],`, good), 422, "series_descriptions"},
		{runWith(`"series_descriptions":{"load":5},`, good), 422, "series_descriptions"},
		{runWith(`"run_id":"nope",`, good), 422, "run_id"}, {runWith(`"run_id":5,`, good), 422, "run_id"},
		{runWith(`"run_id":"`+nobody+`0",`, good), 422, "run_id"},
		{runWith(`"run_id":"`+nobody+`",`, good), 409, "run_id"}, {runWith(`"tenant_id":"`+tenantB+`",`, good), 403, "tenant_id"},
		{runWith(`"extra":1,`, good), 422, "extra"}, {runWith(`"Workflow_ID":"x",`, good), 422, "Workflow_ID"},
		{runWith(`"VALUE_ROWS":[],`, good), 422, "VALUE_ROWS"},
		{runWith(`"workflow_id":"a","workflow_id":"b",`, good), 422, "workflow_id"},
		{runWith(`"value_rows":[],`, good), 422, "value_rows"},
		{`{"run_start_time":"2025-01-01","value_rows":{}}`, 422, "value_rows"},
		{`{"run_start_time":"2025-01-01","value_rows":null}`, 422, "value_rows"},
		{runWith("", good, `5`), 422, "value_rows[1]"}, {runWith("", good, `[]`), 422, "value_rows[1]"},
		{runWith("", good, `null`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":1,"extra":1`), 422, "extra"},
		{row(`"value_key":"load","value":1`), 422, "value_rows[1].valid_time"},
		{row(`"valid_time":null,"value_key":"load","value":1`), 422, "value_rows[1].valid_time"},
		{row(`"valid_time":5,"value_key":"load","value":1`), 422, "valid_time"},
		{row(`"valid_time":"2025-01-01","value":1`), 422, "value_rows[1].value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"","value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":" \t","value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":5,"value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"a\u0000","value":1`), 422, "value_key"},
		{row("\"valid_time\":\"2025-01-01\",\"value_key\":\"\xff\",\"value\":1"), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"load"`), 422, "value_rows[1].value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":"1"`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":true`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":NaN`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":1e999`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":-Infinity`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":"NaN"`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":[1]`), 422, "value"},
		{row(`"valid_time":"2025-01-01","valid_time_end":"2025-01-01","value_key":"load","value":1`), 422, "value_rows[1].valid_time_end"},
		{row(`"valid_time":"2025-01-02","valid_time_end":"2025-01-01T23:00-01:00","value_key":"load","value":1`), 422, "valid_time_end"},
		{row(`"valid_time":"2025-01-01","valid_time_end":"later","value_key":"load","value":1`), 422, "valid_time_end"},
		{row(`"valid_time":"2025-01-01","series_id":"nope","value":1`), 422, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + nobody + `","value":1`), 404, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + seriesB + `","value":1`), 404, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + seriesA + `","value_key":"wind","value":1`), 422, "wind"},
		{runWith("", good, good), 422, "2025-02-01T00:00:00"}, {runWith("", good, at("2025-02-01T01:00:00+01:00", "2")), 422, "twice"},
		{runWith("", good, `{"valid_time":"2025-02-01","series_id":"`+seriesA+`","value":1}`), 422, "twice"},
		{runWith("", at("2025-01-01", "1", `,"valid_time_end":"2025-01-02"`),
			at("2025-01-01", "2", `,"valid_time_end":"2025-01-02T00:00:00Z"`)), 422, "twice"},
		{runWith("", at("2025-01-01T00:00:00.1234567Z", "1"), at("2025-01-01T00:00:00.1234569Z", "1")), 422, "twice"},
	}
	for _, time := range []string{"", "yesterday", "1735689600", "2025", "2025-01", "2025-1-1", "2025-13-01", "2025-02-30",
		"2025-02-29T00:00:00Z", "20250101T000000Z",
		"2025-01-01T24:00:01Z", "2025-01-01T25:00:00Z", "2025-01-01T00:60:00Z", "2025-01-01T00:00:61Z",
		"2025-01-01T00:00:00+99:00", "2025-01-01T00:00:00 UTC", "2025-01-01T1:00:00Z",
		"2025-01-01T00:00:00Z[UTC]", "0001-01-01T00:00:00Z", "1676-12-31T23:59:59Z", "2263-01-01T00:00:00Z", "9999-12-31",
		"12025-01-01", "-2025-01-01", "infinity", "now",
		"2025-01-01T00:00:00Zx", "2025-01-01T00:00:00.Z", " 2025-01-01"} {
		jsonCases = append(jsonCases, struct {
			body   string
			status int
			want   string
		}{row(`"valid_time":"` + time + `","value_key":"load","value":1`), 422, "valid_time"})
	}
	refused := func(want int, detail, path, body string, header ...string) {
		t.Helper()
		text := s.must(t, want, "POST", path, key, body, header...)
		if !strings.Contains(text, detail) {
			t.Errorf("%.300s: %s, want %q in it", body, text, detail)
		}
		if s.stored(t) != before {
			t.Fatalf("%.300s: refused, and yet something was stored", body)
		}
	}
	for _, c := range jsonCases {
		refused(c.status, c.want, "/upload", c.body)
	}
	refused(422, "nope", "/upload?nope=1", runWith("", good))
	refused(422, "workflow_id", "/upload?workflow_id=x", runWith("", good))
	for _, c := range []struct{ query, body, want string }{
		{"", "valid_time,value_key,value\n", "run_start_time"}, {"run_start_time=x", "valid_time,value_key,value\n", "run_start_time"},
		{"run_start_time=2025-01-01&value_rows=x", "valid_time,value_key,value\n", "value_rows"}, {"run_start_time=2025-01-01&nope=1", "", "nope"},
		{"run_start_time=2025-01-01&run_start_time=2025-01-02", "valid_time,value_key,value\n", "run_start_time"},
		{"run_start_time=2025-01-01&run_params=x", "valid_time,value_key,value\n", "run_params"}, {"run_start_time=2025-01-01", "", "header"},
		{"run_start_time=2025-01-01", "valid_time,value_key\n2025-01-01,load\n", "value"}, {"run_start_time=2025-01-01", "valid_time,value_key,value,extra\n", "extra"},
		{"run_start_time=2025-01-01", "valid_time,value,value_key,value\n", "value"}, {"run_start_time=2025-01-01", "Valid_Time,value_key,value\n", "Valid_Time"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-02,load\n", "3"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-02,load,one\n", "value"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,Infinity\n", "value"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1e999\n", "value"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n,load,1\n", "valid_time"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\nsoon,load,1\n", "valid_time"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,,1\n", "value_key"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,\xff,1\n", "value_key"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,\"load,1\n", ""}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-01 00:00,load,2\n", "twice"},
	} {
		refused(422, c.want, "/upload?"+c.query, c.body, "Content-Type: text/csv")
	}
	for body, want := range map[string]string{
		"value\n": "value_key", "valid_time,value_key\n": "value", "value_key,value\n2025,x\n": "valid_time", "valid_time,value\n": "series_id",
		"valid_time,value_key,value\n2025-02-01,load,1_0\n": "line[2].value", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-01,load,x\n": "line[3].value",
		"valid_time;value_key;value\n": "there are series_id, valid_time", strings.Repeat(",", 1<<20): "lines of at most",
		"valid_time,value_key,value\n2025-02-01,load,1" + strings.Repeat(",", 1<<20): "lines of at most",
		strings.Repeat(`"`+strings.Repeat(",", 4000)+"\n", 1000):                     `missing \"`,
	} {
		refused(422, want, "/upload?run_start_time=2025-01-01", body, "Content-Type: text/csv")
	}
	body := runWith("", good)
	for _, header := range []string{"Content-Type: text/plain",
		"Content-Type: application/x-www-form-urlencoded",
		"Content-Type: nonsense/", "Content-Type: application/json; charset=latin1", "Content-Encoding: br"} {
		name, _, _ := strings.Cut(header, ":")
		refused(415, name, "/upload", body, header)
	}
	zipped := gzipped(body)
	refused(422, "body", "/upload", body, "Content-Encoding: gzip")
	refused(422, "", "/upload", zipped[:len(zipped)-12], "Content-Encoding: gzip")
	refused(422, "", "/upload", zipped[:len(zipped)-6]+"\x00\x00\x00\x00\x00\x00", "Content-Encoding: gzip") // the checksum is wrong
	var bomb bytes.Buffer
	w, _ := gzip.NewWriterLevel(&bomb, gzip.BestSpeed)
	w.Write([]byte(`{"workflow_id":"`))
	for range 200 {
		w.Write(bytes.Repeat([]byte("x"), 1<<20))
	}
	w.Close()
	refused(413, "larger", "/upload", bomb.String(), "Content-Encoding: gzip")
	refused(413, "larger", "/upload", `{"workflow_id":"`+strings.Repeat("x", 80<<20))
	refused(422, "body", "/upload", "{"+strings.Repeat(" ", 4<<20)) // white space between tokens
	refused(422, "body", "/upload", "{")                            // and the server still serves
	if log := s.log.String(); strings.Contains(log, "status=500") {
		t.Errorf("a refused upload was an internal error: %s", log)
	}
}

func TestBodyOfUnknownLengthIsBounded(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	// No Content-Length: http.NewRequest does not know what this reader holds.
	body := io.MultiReader(strings.NewReader(`{"workflow_id":"`), strings.NewReader(strings.Repeat("x", 70<<20)), strings.NewReader(`"}`))
	r, err := http.NewRequest("POST", s.url+"/upload", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-API-Key", key)
	r.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 413 {
		t.Errorf("70 MiB without a Content-Length: %s, want 413", resp.Status)
	}
}

func TestRefusalDoesNotRepeatALongInput(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	if text := s.must(t, 422, "POST", "/series", key, `{"`+strings.Repeat("x", 1<<20)+`":1}`); len(text) > 4<<10 {
		t.Errorf("the refusal is %d bytes long", len(text))
	}
	if text := s.log.String(); len(text) > 64<<10 {
		t.Errorf("the log is %d bytes long", len(text))
	}
}

func TestTimestampsAreReadInEveryDocumentedForm(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for i, c := range []struct{ in, out string }{
		{"2025-01-01", "2025-01-01T00:00:00+00:00"}, {"2025-01-01T05", ""}, {"2025-01-01T05:30", "2025-01-01T05:30:00+00:00"},
		{"2025-01-01 05:30:01", "2025-01-01T05:30:01+00:00"},
		{"2025-01-01T05:30:01.5", "2025-01-01T05:30:01.500000+00:00"},
		{"2025-01-01T05:30:01.123456789Z", "2025-01-01T05:30:01.123456+00:00"},
		{"2025-01-01T05:30:00+05:30", "2025-01-01T00:00:00+00:00"}, {"2025-01-01T05:30:00 05:30", "2025-01-01T00:00:00+00:00"},
		{"2025-01-01 05:30-01", "2025-01-01T06:30:00+00:00"},
		{"2025-01-01T05:30:00+0100", "2025-01-01T04:30:00+00:00"},
		{"2024-12-31T23:59:59.999999-00:00", "2024-12-31T23:59:59.999999+00:00"},
		{"1677-01-01T00:00:00Z", "1677-01-01T00:00:00+00:00"},
		{"1969-12-31T23:59:59.000001Z", "1969-12-31T23:59:59.000001+00:00"},
		{"2262-12-31T23:59:59.999999Z", "2262-12-31T23:59:59.999999+00:00"},
		{"1999-12-31T23:59:59.75Z", "1999-12-31T23:59:59.750000+00:00"}, {"2024-02-29T12:00Z", "2024-02-29T12:00:00+00:00"},
	} {
		if c.out == "" {
			continue // an hour alone is neither promised nor refused
		}
		name := fmt.Sprintf("s%d", i)
		s.must(t, 200, "POST", "/upload", key, runWith("", strings.Replace(at(c.in, "1"), "load", name, 1)))
		text := s.must(t, 200, "GET", "/values?series_key="+name+"&start_valid="+strings.NewReplacer(" ", "%20").Replace(c.in),
			key, "") // its plus stays bare
		if !strings.Contains(text, `"valid_time":"`+c.out+`"`) {
			t.Errorf("%s comes back in %s, want %s", c.in, text, c.out)
		}
	}
}

func TestRepeatedUploadAnswersTheSameAndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith(`"run_id":"`+strings.ToUpper(nobody)+`",`, at("2025-01-01", "1"), at("2025-01-02", "2"))
	first := s.must(t, 200, "POST", "/upload", key, body)
	if got := mustDecode[uploadAnswer](t, first); got.RunID != nobody || got.Rows != 2 {
		t.Errorf("POST /upload answers %s, want the run_id that was sent", first)
	}
	before := s.stored(t)
	for range 3 {
		if again := s.must(t, 200, "POST", "/upload", key, body); again != first {
			t.Errorf("the same upload again answers %s, first %s", again, first)
		}
	}
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"value":2`, `"value":3`, 1))
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"run_id"`, `"workflow_id":"x","run_id"`, 1))
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"value_key":"load","value":2`, `"value_key":"new","value":2`, 1))
	if s.stored(t) != before {
		t.Error("a repeated upload stored something")
	}
	csv := func(id, value string) (path, body string) {
		return "/upload?run_start_time=2025-01-01&run_id=" + id, "valid_time,value_key,value\n2025-01-01,load," + value + "\n"
	}
	path, text := csv(tenantB, "5")
	first = s.must(t, 200, "POST", path, key, text, "Content-Type: text/csv")
	if again := s.must(t, 200, "POST", path, key, text, "Content-Type: text/csv"); again != first {
		t.Errorf("the same CSV again answers %s, first %s", again, first)
	}
	_, text = csv(tenantB, "6")
	s.must(t, 409, "POST", path, key, text, "Content-Type: text/csv")
	s.must(t, 409, "POST", path+"&workflow_id=x", key, text, "Content-Type: text/csv")
}

func TestConcurrentUploadsMakeOneRunAndOneSeries(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	row := func(name string) string { return strings.Replace(at("2025-01-01", "1"), "load", name, 1) }
	var answers [8]string
	together(8, func(i int) { // the same run: one stores it, all answer the same
		_, answers[i], _ = s.do("POST", "/upload", key, runWith(`"run_id":"`+nobody+`",`, row("x"), row("y")))
	})
	together(8, func(i int) { // other runs that create the same series, in another order
		rows := []string{row("p"), row("q"), row("r")}
		rows[0], rows[i%3] = rows[i%3], rows[0]
		if resp, text, err := s.do("POST", "/upload", key, runWith("", rows...)); err != nil || resp.StatusCode != 200 {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	together(8, func(int) {
		if resp, text, err := s.do("POST", "/series", key, `{"name":"s","unit":"MW"}`); err != nil || resp.StatusCode != 200 {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	for _, answer := range answers {
		if answer != answers[0] || mustDecode[uploadAnswer](t, answer).RunID != nobody {
			t.Errorf("one of eight equal uploads answers %q, another %q", answer, answers[0])
		}
	}
	if got := s.stored(t); got != "9 6 26 26" {
		t.Errorf("stored %q runs, series, blocks, values, want 9 6 26 26", got)
	}
}

func TestSeriesAreCreatedOncePerNameAndUnit(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	type answer struct {
		ID      string `json:"series_id"`
		Message string `json:"message"`
	}
	first := mustDecode[answer](t, s.must(t, 200, "POST", "/series", key, `{"name":"load","unit":"MW","description":"Load <&> ü"}`))
	again := mustDecode[answer](t, s.must(t, 200, "POST", "/series", key, `{"name":"load","unit":"MW"}`))
	if first.Message != "Series created successfully" || again.Message != "Series already exists" || first.ID != again.ID {
		t.Errorf("POST /series answers %+v, then %+v", first, again)
	}
	s.mustAll(t, key, []httpCase{
		{"POST", "/series", `{"name":"load"}`, 409, []string{"unit"}},
		{"POST", "/series", `{"name":"load","unit":"kW"}`, 409, []string{"unit"}},
		{"POST", "/series", `{"name":" "}`, 422, []string{"name"}}, {"POST", "/series", `{}`, 422, []string{"name"}},
		{"POST", "/series", `{"name":"x","unit":""}`, 422, []string{"unit"}},
		{"POST", "/series", `{"name":5}`, 422, []string{"name"}}, {"POST", "/series", `{"name":"x","extra":1}`, 422, []string{"extra"}},
		{"POST", "/series", `{"name":"x","name":"y"}`, 422, []string{"name"}},
		{"POST", "/series", `{"name":"x\u0000"}`, 422, []string{"name"}},
		{"POST", "/series?x=1", `{"name":"x"}`, 422, []string{"x"}}, {"POST", "/series", `name=x`, 422, []string{"body"}},
		{"POST", "/series", `{"name":"empty"}`, 200, []string{"Series created successfully"}},
		{"GET", "/list_timeseries", ``, 200, []string{`"series_key":"empty"`, `"unit":"dimensionless"`, `"series_key":"load"`}},
		{"GET", "/list_timeseries?x=1", ``, 422, []string{"x"}},
		{"GET", "/values?series_key=empty", ``, 200, []string{`"count":0`, `"data":[]`}},
	})
	// An upload finds a series by its key whatever its unit, or by its id.
	got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1"),
		`{"valid_time":"2025-01-02","series_id":"`+strings.ToUpper(first.ID)+`","value":2}`,
		`{"valid_time":"2025-01-03","series_id":"`+first.ID+`","value_key":"load","value":3}`)))
	if len(got.SeriesIDs) != 1 || got.SeriesIDs["load"] != first.ID || got.Rows != 3 {
		t.Errorf("POST /upload by key and by id answers %+v", got)
	}
	if text := s.must(t, 200, "GET", "/values", key, ""); strings.Count(text, `"series_unit":"MW"`) != 3 {
		t.Errorf("GET /values: %s", text)
	}
}

// valuesOf reads what is stored under a name, with the name and the id taken out.
func (s *testServer) valuesOf(t *testing.T, key, name string) string {
	id := mustQuery(t, s.db, `SELECT series_id FROM series_table WHERE series_key = $1`, name)
	text := s.must(t, 200, "GET", "/values?mode=overlapping&series_key="+name, key, "")
	text = regexp.MustCompile(`"known_time":"[^"]*"`).ReplaceAllString(text, "")
	return strings.NewReplacer(id, "", `"`+name+`"`, "").Replace(text)
}

func TestCSVAndGzipStoreWhatJSONStores(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith("", at("2025-01-01T00:00:00Z", "1.5"), at("2025-01-01T01:00:00+00:00", "null"), at("2025-01-01 02:00", "1e-7"), at("2025-01-01T00:00:00Z", "-3", `,"valid_time_end":"2025-01-02"`))
	csv := "value_key,value,valid_time_end,valid_time\r\nload,1.5,,2025-01-01T00:00:00Z\r\nload,NaN,,2025-01-01T01:00:00+00:00\r\n\"load\",1e-7,,2025-01-01 02:00\nload,-3,2025-01-02,2025-01-01T00:00:00Z"
	const path = "/upload?run_start_time=2025-01-01T00:00:00+00:00&run_params=%7B%22a%22:1%7D&workflow_id=csv"
	named := func(text, name string) string { return strings.ReplaceAll(text, "load", name) }
	s.must(t, 200, "POST", "/upload", key, body)
	s.must(t, 200, "POST", "/upload", key, gzipped(named(body, "zipped")), "Content-Encoding: gzip")
	s.must(t, 200, "POST", path, key, named(csv, "csv"), "Content-Type: text/csv; charset=UTF-8")
	s.must(t, 200, "POST", path, key, named(strings.Replace(csv, "NaN", "", 1), "empty"), "Content-Type: text/csv")
	s.must(t, 200, "POST", path, key, gzipped(named(csv, "both")), "Content-Type: text/csv", "Content-Encoding: gzip")
	s.must(t, 200, "POST", path, key, "\ufeff"+named(csv, "excel"), "Content-Type: text/csv")
	want := s.valuesOf(t, key, "load")
	if strings.Count(want, `"value":`) != 4 || !strings.Contains(want, `"value":null`) {
		t.Errorf("JSON stores %s", want)
	}
	for _, name := range []string{"zipped", "csv", "empty", "both", "excel"} {
		if got := s.valuesOf(t, key, name); got != want {
			t.Errorf("%s stores %s\nJSON stores %s", name, got, want)
		}
	}
	if got := mustQuery(t, s.db, `SELECT count(*) FROM runs_table WHERE workflow_id = 'csv' AND run_params->>'a' = '1'`); got != "4" {
		t.Errorf("%s of 4 CSV uploads have their run_params", got)
	}
}

func TestLongSeriesComeBackExactly(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	special := []float64{0.1, 1e-7, 1e300, 5e-324, math.MaxFloat64, -math.MaxFloat64, 1 / 3.0, 0, 1e15, 1e16,
		123456789.123456789, 1e21, 0.0001, 0.00001, 9007199254740993}
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	var times []time.Time
	for i := range 2500 { // over a thousand values, and over 32 days
		times = append(times, begin.Add(time.Duration(i)*time.Hour))
	}
	for _, gap := range []time.Duration{0, 32*24*time.Hour - time.Microsecond, 32 * 24 * time.Hour, 32*24*time.Hour + time.Microsecond} {
		times = append(times, begin.AddDate(3, 0, 0).Add(gap))
	}
	for i := range 1001 {
		times = append(times, begin.AddDate(10, 0, 0).Add(time.Duration(i)*time.Microsecond))
	}
	value := func(i int) float64 {
		if i < len(special) {
			return special[i]
		}
		return math.Ldexp(float64(i*i*7919%1_000_003), -i%40)
	}
	rows := make([]string, len(times))
	for i, at := range times {
		rows[i] = fmt.Sprintf(`{"valid_time":%q,"value_key":"load","value":%s}`, at.Format(time.RFC3339Nano),
			strconv.FormatFloat(value(i), 'g', -1, 64))
	}
	rand.Shuffle(len(rows), func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	s.must(t, 200, "POST", "/upload", key, runWith("", rows...))
	type answer struct {
		Count int
		Data  []struct {
			At    time.Time `json:"valid_time"`
			Value float64
		}
	}
	got := mustDecode[answer](t, s.must(t, 200, "GET", "/values", key, ""))
	if got.Count != len(times) || len(got.Data) != len(times) {
		t.Fatalf("%d rows and a count of %d, want %d", len(got.Data), got.Count, len(times))
	}
	for i, row := range got.Data {
		if !row.At.Equal(times[i]) || row.Value != value(i) {
			t.Fatalf("row %d is %v, want %v %v", i, row, times[i], value(i))
		}
	}
	for range 200 { // any window shows just what lies in it
		i := rand.Intn(len(times))
		j := i + rand.Intn(min(1500, len(times)-i))
		query := fmt.Sprintf("/values?start_valid=%s&end_valid=%s", url.QueryEscape(times[i].Format(time.RFC3339Nano)),
			url.QueryEscape(times[j].Add(time.Microsecond).Format(time.RFC3339Nano)))
		part := mustDecode[answer](t, s.must(t, 200, "GET", query, key, ""))
		if part.Count != j-i+1 || !part.Data[0].At.Equal(times[i]) || !part.Data[j-i].At.Equal(times[j]) {
			t.Fatalf("%s: %d rows, want %d", query, part.Count, j-i+1)
		}
	}
}

// ---- Read

// mustPicture uploads what the tests of this part read: two runs of load known at different times, a third known when the
// second was, an interval series, and a correction of one value.
func mustPicture(t *testing.T, s *testServer) (key string, series map[string]string) {
	t.Helper()
	key = s.mustUser(t, tenantA, "a@example.com")
	series = map[string]string{}
	row := func(name, hour, value string, more ...string) string {
		return strings.Replace(at("2025-01-01T"+hour+":00:00Z", value, more...), "load", name, 1)
	}
	end := func(hour string) string { return `,"valid_time_end":"2025-01-01T` + hour + `:00:00Z"` }
	for i, rows := range [][]string{
		{row("load", "00", "1"), row("load", "01", "2"), row("load", "02", "null"), row("wind", "00", "0.5")},
		{row("load", "03", "4.5"), row("load", "01", "2.5"), row("load", "02", "3.5"), row("price", "00", "20", end("02")),
			row("price", "00", "10", end("01"))},
		{row("load", "03", "9")},
	} {
		known := []string{"2024-12-31T00:00:00Z", "2024-12-31T12:00:00Z", "2024-12-31T12:00:00Z"}[i]
		got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith(`"known_time":"`+known+`",`, rows...)))
		for name, id := range got.SeriesIDs {
			series[name] = id
		}
	}
	s.must(t, 200, "PUT", "/values", key, `{"updates":[{"series_key":"load","valid_time":"2025-01-01T02:00:00Z","value":3.75,"annotation":"checked","tags":["a","b"]}]}`)
	return key, series
}

// answerRow is one row of GET /values.
type answerRow struct {
	Known      *time.Time `json:"known_time"`
	Valid      time.Time  `json:"valid_time"`
	End        *time.Time `json:"valid_time_end"`
	Series     string     `json:"series_id"`
	Key        string     `json:"series_key"`
	Unit       string     `json:"series_unit"`
	Value      *float64   `json:"value"`
	Run        string     `json:"run_id"`
	Change     string     `json:"change_time"`
	ChangedBy  *string    `json:"changed_by"`
	Annotation *string    `json:"annotation"`
	Tags       []string   `json:"tags"`
	Version    int        `json:"version"`
}

type readAnswer struct {
	Count int         `json:"count"`
	Data  []answerRow `json:"data"`
}

// brief is a read in short: each row as "known/key hour[-end]=value", known and end as hours, too.
func brief(t *testing.T, text string) string {
	t.Helper()
	got := mustDecode[readAnswer](t, text)
	if got.Count != len(got.Data) {
		t.Errorf("count is %d for %d rows", got.Count, len(got.Data))
	}
	var rows []string
	for _, r := range got.Data {
		row := r.Key + " " + r.Valid.Format("15")
		if r.Known != nil {
			row = r.Known.Format("15") + "/" + row
		}
		if r.End != nil {
			row += "-" + r.End.Format("15")
		}
		if row += "=null"; r.Value != nil {
			row = strings.TrimSuffix(row, "null") + strconv.FormatFloat(*r.Value, 'g', -1, 64)
		}
		if r.Version > 0 {
			row += fmt.Sprintf(" v%d", r.Version)
		}
		rows = append(rows, row)
	}
	return strings.Join(rows, ", ")
}

func TestReadsShowWhatTheParametersAskFor(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	const flat = "load 00=1, load 01=2.5, load 02=3.75, load 03=9, price 00-01=10, price 00-02=20, wind 00=0.5"
	for query, want := range map[string]string{
		"":                                 flat,
		"mode=flat&all_versions=false":     flat,
		"mode=overlapping&series_key=load": "00/load 00=1, 00/load 01=2, 00/load 02=null, 12/load 01=2.5, 12/load 02=3.75, 12/load 03=4.5, 12/load 03=9",
		"mode=overlapping&series_key=wind&series_id=" + series["price"]:                   "12/price 00-01=10, 12/price 00-02=20, 00/wind 00=0.5",
		"series_id=" + series["wind"] + "&series_id=" + strings.ToUpper(series["wind"]):   "wind 00=0.5",
		"series_key=wind&series_id=" + series["wind"]:                                     "wind 00=0.5",
		"series_key=load&start_valid=2025-01-01T01:00:00Z&end_valid=2025-01-01T03:00:00Z": "load 01=2.5, load 02=3.75",
		"start_valid=2025-01-01T00:00:01Z&series_key=price":                               "",
		"end_valid=2025-01-01T00:00:00Z":                                                  "",
		"end_known=2024-12-31T12:00:00Z&series_key=load":                                  "load 00=1, load 01=2, load 02=null",
		"start_known=2024-12-31T12:00:00Z&series_key=load":                                "load 01=2.5, load 02=3.75, load 03=9",
		"start_known=2025-01-01":                                                          "",
		"series_key=load&all_versions=true&start_valid=2025-01-01T02:00:00Z":              "00/load 02=null v1, 12/load 02=3.5 v1, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1",
		"series_key=load&lead=PT24H":                                                      "load 00=1, load 01=2, load 02=null",
		"series_key=load&lead=13h":                                                        "load 00=1, load 01=2.5, load 02=3.75, load 03=9",
		"series_key=load&lead=PT13H0.000001S":                                             "load 00=1, load 01=2, load 02=3.75, load 03=9",
		"lead=P1DT1H&series_key=load":                                                     "load 01=2, load 02=null",
		"lead=P1W":                                                                        "",
		"bucket=PT2H&agg=mean&series_key=load":                                            "load 00=1.75, load 02=6.375",
		"bucket=2h&agg=min&series_key=load":                                               "load 00=1, load 02=3.75",
		"bucket=P1D&agg=max":                                                              "load 00=9, price 00=20, wind 00=0.5",
		"bucket=P1D&agg=sum":                                                              "load 00=16.25, price 00=30, wind 00=0.5",
		"bucket=P1D&agg=count&end_known=2024-12-31T12:00:00Z":                             "load 00=2, wind 00=1",
		"bucket=PT1H&agg=mean&series_key=load&end_known=2024-12-31T12:00:00Z":             "load 00=1, load 01=2",
		"bucket=90m&agg=max&series_key=load&start_valid=2025-01-01T01:00:00Z":             "load 00=2.5, load 01=3.75, load 03=9",
		"bucket=PT1H&agg=count&series_key=load&limit=2":                                   "load 00=1, load 01=1",
		"limit=3":                    "load 00=1, load 01=2.5, load 02=3.75",
		"limit=1000&series_key=wind": "wind 00=0.5",
		"as_of=2020-01-01":           "",
	} {
		if got := brief(t, s.must(t, 200, "GET", "/values?"+query, key, "")); got != want {
			t.Errorf("GET /values?%s\nshows %s\nwant  %s", query, got, want)
		}
	}
	for _, query := range []string{"series_key=nope", "series_id=" + nobody, "series_key=load&series_key=nope",
		"as_of=2020-01-01&series_key=load"} {
		s.must(t, 404, "GET", "/values?"+query, key, "")
	}
	for query, field := range map[string]string{
		"nope=1": "nope", "Mode=flat": "Mode", "mode=": "mode", "mode=both": "mode", "mode=flat&mode=flat": "mode",
		"series_id=x": "series_id", "start_valid=x": "start_valid", "end_valid=": "end_valid",
		"start_known=2025-13-01": "start_known", "end_known=x": "end_known", "as_of=x": "as_of",
		"start_valid=2025-01-02&end_valid=2025-01-02": "valid",
		"start_known=2025-01-02&end_known=2025-01-01": "known", "all_versions=perhaps": "all_versions", "detail=2": "detail",
		"limit=0": "limit", "limit=-1": "limit", "limit=x": "limit", "limit=1e3": "limit",
		"series_key=": "series_key", "series_id=": "series_id", "start_valid=%zz": "query",
		"lead=x": "lead", "lead=P1M": "lead", "lead=": "lead", "lead=-1h": "lead", "lead=P": "lead", "lead=PT": "lead",
		"bucket=PT1H": "agg", "agg=mean": "bucket", "bucket=PT1H&agg=median": "agg", "bucket=0s&agg=mean": "bucket",
		"bucket=-1h&agg=mean": "bucket", "bucket=1ns&agg=mean": "bucket", "bucket=P300000D&agg=mean": "bucket",
		"bucket=PT1H&agg=mean&mode=overlapping": "bucket", "bucket=PT1H&agg=mean&all_versions=true": "bucket",
		"bucket=PT1H&agg=mean&detail=true": "bucket", "format=xml": "format",
	} {
		if text := s.must(t, 422, "GET", "/values?"+query, key, ""); !strings.Contains(text, field) {
			t.Errorf("GET /values?%s: %s, want %s in it", query, text, field)
		}
	}
}

func TestOverlappingRunsOfOneKnownTimeAreOrderedByValidTime(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const known = `"known_time":"2025-01-01T00:00:00Z",`
	s.must(t, 200, "POST", "/upload", key, runWith(known, at("2025-01-01T00:00:00Z", "1"), at("2025-01-01T02:00:00Z", "2")))
	s.must(t, 200, "POST", "/upload", key, runWith(known, at("2025-01-01T01:00:00Z", "3"), at("2025-01-01T03:00:00Z", "4")))
	const want = "00/load 00=1, 00/load 01=3, 00/load 02=2, 00/load 03=4"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping", key, "")); got != want {
		t.Errorf("GET /values?mode=overlapping\nshows %s\nwant  %s (series_key, known_time, valid_time)", got, want)
	}
}

func TestFirstUploadIsThereAsOfItsOwnChangeTime(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for i := range 20 {
		name := fmt.Sprint("series", i)
		s.must(t, 200, "POST", "/upload", key, `{"run_start_time":"2025-01-01","value_rows":[{"valid_time":"2025-01-01","value_key":"`+name+`","value":1}]}`)
		detail := mustDecode[struct {
			Data []struct {
				Change string `json:"change_time"`
			}
		}](t, s.must(t, 200, "GET", "/values?detail=true&series_key="+name, key, ""))
		asOf := url.QueryEscape(detail.Data[0].Change)
		if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?series_key="+name+"&as_of="+asOf, key, "")); got.Count != 1 {
			t.Fatalf("as of its own change_time %s the upload has %d values", asOf, got.Count)
		}
	}
}

// canonical is a JSON object with its members in order and its numbers as they are written.
func canonical(t *testing.T, text string) string {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	b, _ := json.Marshal(v)
	return string(b)
}

func TestRowsAreWrittenAsDocumented(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	s.must(t, 200, "POST", "/upload", key, runWith("",
		`{"valid_time":"2025-06-01T02:00:00.000250+02:00","value_key":"a \"quoted\", <ü>\\","value":1e-7}`,
		`{"valid_time":"2025-06-01T02:00:00+02:00","value_key":"a \"quoted\", <ü>\\","value":-1e300}`))
	runOf := func(where string) string {
		return mustQuery(t, s.db, `SELECT run_id FROM values_table v JOIN series_table s USING (tenant_id, series_id) WHERE `+where)
	}
	change := func(where string) string {
		return mustQuery(t, s.db, `SELECT replace(to_char(change_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), '.000000', '') || '+00:00'
			FROM values_table v JOIN series_table s USING (tenant_id, series_id) WHERE `+where)
	}
	read := func(query string, header ...string) string {
		return s.must(t, 200, "GET", "/values?"+query, key, "", header...)
	}
	load, price := `"series_id":"`+series["load"]+`"`, `"series_id":"`+series["price"]+`"`
	const second = "series_key = 'load' AND version = 2"
	for query, want := range map[string]string{
		"limit=1&series_key=load": `{"valid_time":"2025-01-01T00:00:00+00:00",` + load + `,"value":1.0,"series_key":"load","series_unit":"dimensionless"}`,
		"limit=1&series_key=load&mode=overlapping&start_valid=2025-01-01T02:00:00Z": `{"known_time":"2024-12-31T00:00:00+00:00","valid_time":"2025-01-01T02:00:00+00:00",` + load +
			`,"value":null,"series_key":"load","series_unit":"dimensionless"}`,
		"limit=1&series_key=price": `{"valid_time":"2025-01-01T00:00:00+00:00",` + price + `,"value":10.0,"series_key":"price","series_unit":"dimensionless","valid_time_end":"2025-01-01T01:00:00+00:00"}`,
		"series_key=load&detail=true&start_valid=2025-01-01T02:00:00Z&limit=1": `{"valid_time":"2025-01-01T02:00:00+00:00",` + load + `,"value":3.75,"series_key":"load","series_unit":"dimensionless",` +
			`"run_id":"` + runOf(second) + `","known_time":"2024-12-31T12:00:00+00:00","valid_time_end":null,"change_time":"` + change(second) + `","changed_by":"a@example.com","annotation":"checked","tags":["a","b"],"version":2}`,
		"series_key=price&mode=overlapping&all_versions=true&limit=1": `{"known_time":"2024-12-31T12:00:00+00:00","valid_time":"2025-01-01T00:00:00+00:00",` + price + `,"value":10.0,"series_key":"price","series_unit":"dimensionless",` +
			`"run_id":"` + runOf("series_key = 'price'") + `","valid_time_end":"2025-01-01T01:00:00+00:00","change_time":"` + change("series_key = 'price'") + `","changed_by":"a@example.com","annotation":null,"tags":null,"version":1}`,
	} {
		got := mustDecode[struct{ Data []json.RawMessage }](t, read(query))
		if len(got.Data) != 1 || canonical(t, string(got.Data[0])) != canonical(t, want) {
			t.Errorf("GET /values?%s\nshows %s\nwant  %s", query, got.Data, want)
		}
	}
	odd := mustDecode[readAnswer](t, read("start_valid=2025-06-01"))
	if text := read("start_valid=2025-06-01"); odd.Data[0].Key != `a "quoted", <ü>\` ||
		!strings.Contains(text, `"2025-06-01T00:00:00.000250+00:00"`) ||
		!strings.Contains(text, `"value":1e-07`) || !strings.Contains(text, `"value":-1e+300`) {
		t.Errorf("an odd key, a fraction of a second, extreme values: %s", text)
	}
	const columns = "valid_time,series_id,value,series_key,series_unit,valid_time_end\n"
	id := series["load"]
	csv := columns + "2025-01-01T02:00:00+00:00," + id + `,3.75,"load","dimensionless",` + "\n" +
		"2025-01-01T03:00:00+00:00," + id + `,9.0,"load","dimensionless",` + "\n"
	const window = "series_key=load&start_valid=2025-01-01T02:00:00Z"
	if got := read(window + "&format=csv"); got != csv {
		t.Errorf("format=csv: %q, want %q", got, csv)
	}
	if got := read(window, "Accept: text/csv"); got != csv {
		t.Errorf("Accept: text/csv: %q, want %q", got, csv)
	}
	if got, want := read(window+"&end_known=2024-12-31T12:00:00Z&mode=overlapping&format=csv", "Accept: application/json"), "known_time,"+
		columns+"2024-12-31T00:00:00+00:00,2025-01-01T02:00:00+00:00,"+id+`,,"load","dimensionless",`+"\n"; got != want {
		t.Errorf("a NULL in overlapping CSV: %q, want %q", got, want)
	}
	odd.Data = nil
	text := read("start_valid=2025-06-01T00:00:00.0001Z&format=csv")
	if !strings.Contains(text, `,1e-07,"a ""quoted"", <ü>\","dimensionless",`) {
		t.Errorf("an odd key in CSV: %q", text)
	}
	for _, mode := range []string{"", "&mode=overlapping"} {
		text := read("series_key=load&format=csv&detail=true&start_valid=2025-01-01T02:00:00Z" + mode)
		if !strings.Contains(text, `,"a@example.com","checked","[""a"",""b""]",2`+"\n") {
			t.Errorf("detail in CSV: %q", text)
		}
		// The columns are those of JSON, by the same names and in the same order.
		var names []string
		dec := json.NewDecoder(strings.NewReader(read("series_key=load&detail=true&limit=1" + mode)))
		for range 3 {
			dec.Token()
		}
		for dec.Token(); dec.More(); {
			name, _ := dec.Token()
			names = append(names, name.(string))
			var value any
			dec.Decode(&value)
		}
		if header, _, _ := strings.Cut(text, "\n"); header != strings.Join(names, ",") {
			t.Errorf("the columns of CSV are %s, the members of JSON %q", header, names)
		}
	}
	if got := read("start_valid=2030-01-01&format=csv"); got != columns {
		t.Errorf("nothing to show in CSV: %q", got)
	}
	if got := read("start_valid=2030-01-01"); got != `{"data":[],"count":0}`+"\n" {
		t.Errorf("nothing to show: %q", got)
	}
}

// mustManyValues uploads n values of the series load in steps of a minute.
func mustManyValues(t testing.TB, s *testServer, key string, n int) {
	t.Helper()
	const most = 250_000
	begin := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for first := 0; first < n; first += most {
		text := []byte(`{"run_start_time":"2020-01-01","known_time":"2020-01-01","value_rows":[`)
		for i := first; i < min(n, first+most); i++ {
			text = begin.Add(time.Duration(i)*time.Minute).AppendFormat(append(text, `{"value_key":"load","valid_time":"`...),
				time.RFC3339)
			text = append(strconv.AppendInt(append(text, `","value":`...), int64(i%1000), 10), ".25},"...)
		}
		s.must(t, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
}

func TestLongResponsesAreCompleteOrVisiblyBroken(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 1_000_000
	mustManyValues(t, s, key, n)
	window := "/values?end_valid=2020-02-15T00:00:00Z" // 64,800 values
	text := s.must(t, 200, "GET", window, key, "")
	if got := mustDecode[readAnswer](t, text); got.Count != 64_800 || len(got.Data) != 64_800 || len(text) < 5<<20 ||
		got.Data[64_799].Valid.Format("01-02T15:04") != "02-14T23:59" {
		t.Errorf("%d rows, count %d, %d bytes", len(got.Data), got.Count, len(text))
	}
	for header, compressed := range map[string]bool{"gzip": true, "deflate, GZIP;q=0.5": true, "br": false, "gzip;q=0": false,
		"identity": false, "xgzip": false} {
		resp, got, err := s.do("GET", window, key, "", "Accept-Encoding: "+header)
		if err != nil {
			t.Fatal(err)
		}
		zipped := resp.Header.Get("Content-Encoding") == "gzip"
		if zipped != compressed || !strings.Contains(resp.Header.Get("Vary"), "Accept-Encoding") {
			t.Errorf("Accept-Encoding %q: %v", header, resp.Header)
		} else if zipped && (len(got) > len(text)/5 || mustUnzip(t, got) != text) {
			t.Errorf("the compressed response, of %d bytes, differs from the plain one", len(got))
		}
	}
	for _, query := range []string{"", "?mode=overlapping&detail=true", "?format=csv", "?format=json"} {
		r, _ := http.NewRequest("GET", s.url+"/values"+query, nil)
		r.Header.Set("X-API-Key", key)
		if query == "?format=json" {
			r.Header.Set("Accept-Encoding", "gzip") // http.Client asks for it too, and then unpacks it
		}
		resp, err := s.client.Do(r)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v %v", resp, err)
		}
		// The response has begun; the database still has most of it.
		if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
			t.Fatal(err)
		}
		mustExec(t, s.db, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE datname = current_database() AND usename = $1`, appRole.name)
		size, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("GET /values%s ended after %d bytes as if it were complete", query, size)
		}
	}
	if line := s.mustRaw(t, "GET /values HTTP/1.0\r\nHost: x\r\nX-API-Key: "+key+"\r\n\r\n"); !strings.Contains(line, " 505 ") {
		t.Errorf("HTTP/1.0, whose client could not see that an answer is broken: %q", line)
	}
	onePiece := s.must(t, 200, "GET", window+"&limit=200", key, "", "Accept-Encoding: identity")
	if _, zipped, err := s.do("GET", window+"&limit=200", key, "", "Accept-Encoding: gzip"); err != nil || mustUnzip(t, zipped) != onePiece {
		t.Error("an answer that was compressed in one piece is not whole")
	}
	s.must(t, 200, "GET", window+"&limit=1", key, "") // what is broken is not used again
	if !strings.Contains(s.log.String(), "broken=true") {
		t.Error("the log does not tell of the broken responses")
	}
}

// ---- Model

// A history is some uploads and corrections of one tenant, done over HTTP and mirrored in the plainest possible model:
// a list of every version ever written. Times are microseconds since 1970; end 0 means that there is none.
type history struct {
	s        *testServer
	rng      *rand.Rand
	tenant   string
	keys     [2]string // of two users
	runs     []modelRun
	versions []modelVersion
	series   map[string]modelSeries
	moments  []modelMoment
}

type modelRun struct {
	id    string
	known int64
}

type modelSeries struct {
	id   string
	born int // how many moments there were before it
}

type modelVersion struct {
	series   string
	run      int // an index: the order of insertion
	time     int64
	end      int64
	value    *float64
	note, by string
	tags     []string
	number   int
}

// modelMoment is a time by the database's clock, how much there was then, and what a read answered then.
type modelMoment struct {
	at       string
	versions int
	query    url.Values
	answer   string
}

const (
	hour     = int64(time.Hour / time.Microsecond)
	modelDay = int64(1_735_689_600_000_000) // 2025-01-01
)

func iso(t int64) string { return time.UnixMicro(t).UTC().Format("2006-01-02T15:04:05.999999-07:00") }

var modelSeed = flag.Int64("seed", 0, "the first history's seed in TestReadsAgreeWithNaiveModel; 0: a random one")

func TestReadsAgreeWithNaiveModel(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	s.db.SetMaxIdleConns(16)
	base := cmp.Or(*modelSeed, rand.Int63())
	var next, failed atomic.Int64
	together(8, func(int) {
		for i := next.Add(1) - 1; i < int64(*histories) && failed.Load() < 3; i = next.Add(1) - 1 {
			h := &history{s: s, rng: rand.New(rand.NewSource(base + i)), series: map[string]modelSeries{}}
			if err := h.play(); err != nil {
				failed.Add(1)
				t.Errorf("%v\nagain: go test -run TestReadsAgreeWithNaiveModel -histories 1 -seed %d", err, base+i)
			}
		}
	})
}

func (h *history) play() error {
	h.tenant = fmt.Sprintf("%08x-%04x-4000-8000-%012x", h.rng.Uint32(), h.rng.Intn(1<<16), h.rng.Int63n(1<<48))
	for i := range h.keys {
		key, id, _ := newKey()
		digest := sha256.Sum256([]byte(key))
		h.keys[i] = key
		if _, err := h.s.db.Exec(`INSERT INTO users_table (tenant_id, email, key_id, key_digest) VALUES ($1, $2, $3, $4)`,
			h.tenant, h.email(i), id, digest[:]); err != nil {
			return err
		}
	}
	for step := range 2 + h.rng.Intn(5) {
		act := h.correct
		if step == 0 || h.rng.Intn(2) == 0 {
			act = h.upload
		}
		if err := act(h.rng.Intn(2)); err != nil {
			return err
		}
		m := modelMoment{versions: len(h.versions)}
		if err := h.s.db.QueryRow(`SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`).Scan(&m.at); err != nil {
			return err
		}
		m.query = h.question()
		var err error
		if m.answer, err = h.compare(m.query, len(h.versions), len(h.moments)); err != nil {
			return err
		}
		h.moments = append(h.moments, m)
	}
	for i, m := range h.moments { // every moment's answer can be had again
		m.query.Set("as_of", m.at)
		if _, again, err := h.s.do("GET", "/values?"+m.query.Encode(), h.keys[0], ""); err != nil || again != m.answer {
			return fmt.Errorf("GET /values?%s\nanswers  %s\nanswered %s at that moment (%v)", m.query.Encode(), again, m.answer, err)
		}
		query := h.question()
		query.Set("as_of", m.at)
		if _, err := h.compare(query, m.versions, i); err != nil {
			return err
		}
	}
	return nil
}

func (h *history) email(user int) string { return fmt.Sprintf("user%d@example.com", user) }

// pick returns a random one.
func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.Intn(len(from))] }

func (h *history) point() (t, end int64) {
	t = modelDay + int64(h.rng.Intn(8))*hour
	if h.rng.Intn(10) == 0 {
		t += 40 * 24 * hour
	}
	return t, pick(h.rng, 0, 0, 0, t+hour, t+2*hour)
}

func (h *history) value() *float64 {
	if h.rng.Intn(6) == 0 {
		return nil
	}
	f := float64(h.rng.Intn(4)) * 0.5
	return &f
}

// upload sends a random run.
func (h *history) upload(user int) error {
	body := map[string]any{"run_start_time": "2025-01-01"}
	run := modelRun{known: modelDay - int64(h.rng.Intn(4))*6*hour}
	nowKnown := h.rng.Intn(10) == 0
	if !nowKnown {
		body["known_time"] = iso(run.known)
	}
	var rows []map[string]any
	taken := map[string]bool{}
	add := func(name string, t, end int64) {
		v := modelVersion{series: name, run: len(h.runs), time: t, end: end, value: h.value(), by: h.email(user), number: 1}
		if place := fmt.Sprint(name, t, end); taken[place] {
			return
		} else {
			taken[place] = true
		}
		row := map[string]any{"valid_time": h.when(t), "value": v.value}
		if end != 0 {
			row["valid_time_end"] = h.when(end)
		}
		if x, known := h.series[name]; known && h.rng.Intn(2) == 0 {
			row["series_id"] = x.id
		} else {
			row["value_key"] = name
		}
		rows, h.versions = append(rows, row), append(h.versions, v)
	}
	for range 1 + h.rng.Intn(8) {
		t, end := h.point()
		add(pick(h.rng, "a", "b", "c"), t, end)
	}
	if h.rng.Intn(100) == 0 { // more than one block
		for i := range int64(1100) {
			add("a", modelDay+i*hour/60, 0)
		}
	}
	path, text, header := h.written(body, rows)
	resp, answer, err := h.s.do("POST", path, h.keys[user], text, header...)
	var got uploadAnswer
	if err != nil || resp.StatusCode != 200 || json.Unmarshal([]byte(answer), &got) != nil {
		return fmt.Errorf("POST /upload %s: %v %v %s", text, resp, err, answer)
	}
	for name, id := range got.SeriesIDs {
		if x, known := h.series[name]; !known {
			h.series[name] = modelSeries{id, len(h.moments)}
		} else if x.id != id {
			return fmt.Errorf("series %s became another", name)
		}
	}
	if run.id = got.RunID; nowKnown {
		err = h.s.db.QueryRow(`SELECT (extract(epoch FROM known_time) * 1000000)::bigint FROM runs_table WHERE tenant_id = $1 AND run_id = $2`, h.tenant, run.id).Scan(&run.known)
	}
	h.runs = append(h.runs, run)
	return err
}

// when writes a time in one of the ways that mean the same instant.
func (h *history) when(t int64) string {
	at := time.UnixMicro(t).In(time.FixedZone("", pick(h.rng, 2*3600, -(3*3600+1800))))
	return pick(h.rng, iso(t), at.Format(time.RFC3339Nano), at.UTC().Format("2006-01-02 15:04:05.999999"))
}

// written makes a request of an upload: as JSON or as CSV, packed or not. All must store the same.
func (h *history) written(run map[string]any, rows []map[string]any) (path, text string, header []string) {
	path = "/upload"
	if h.rng.Intn(2) == 0 {
		run["value_rows"] = rows
		body, _ := json.Marshal(run)
		text = string(body)
	} else {
		query, lines := url.Values{}, []string{"series_id,valid_time,value,value_key,valid_time_end"}
		for name, value := range run {
			query.Set(name, value.(string))
		}
		for _, row := range rows {
			cells := []string{}
			for _, name := range strings.Split(lines[0], ",") {
				cell := ""
				if f, isNumber := row[name].(*float64); isNumber && f != nil {
					cell = fmt.Sprint(*f)
				} else if isNumber {
					cell = pick(h.rng, "", "NaN")
				} else if row[name] != nil {
					cell = row[name].(string)
				}
				cells = append(cells, cell)
			}
			lines = append(lines, strings.Join(cells, ","))
		}
		path, text, header = path+"?"+query.Encode(), strings.Join(lines, "\n"), []string{"Content-Type: text/csv"}
	}
	if h.rng.Intn(3) == 0 {
		text, header = gzipped(text), append(header, "Content-Encoding: gzip")
	}
	return path, text, header
}

// later tells whether v counts rather than w, of versions of one series and time.
func (h *history) later(v, w modelVersion) bool {
	return cmp.Or(cmp.Compare(h.runs[v.run].known, h.runs[w.run].known), cmp.Compare(v.run, w.run), cmp.Compare(v.number, w.number)) > 0
}

type modelUpdate struct {
	SeriesID  string           `json:"series_id,omitempty"`
	SeriesKey string           `json:"series_key,omitempty"`
	Time      string           `json:"valid_time"`
	End       *string          `json:"valid_time_end,omitempty"`
	RunID     string           `json:"run_id,omitempty"`
	Known     *string          `json:"known_time,omitempty"`
	Value     *json.RawMessage `json:"value,omitempty"`
	Note      *json.RawMessage `json:"annotation,omitempty"`
	Tags      *json.RawMessage `json:"tags,omitempty"`
}

// update makes a random update, and returns the version that it would write and its status: 200, 404 or 422. same tells
// that it changes nothing.
func (h *history) update(user int) (u modelUpdate, next modelVersion, same bool, status int) {
	v := pick(h.rng, h.versions...)
	name, t, end := v.series, v.time, v.end
	if h.rng.Intn(4) == 0 {
		t, end = h.point()
	}
	if h.rng.Intn(20) == 0 {
		name = pick(h.rng, "a", "b", "c", "unknown")
	}
	u.Time = h.when(t)
	if end != 0 {
		text := h.when(end)
		u.End = &text
	}
	x, seriesKnown := h.series[name]
	if u.SeriesKey = name; seriesKnown && h.rng.Intn(2) == 0 {
		u.SeriesKey, u.SeriesID = "", x.id
	}
	run := pick(h.rng, h.runs...)
	known := run.known
	if named := h.rng.Intn(5); named == 1 || named == 3 {
		u.RunID = pick(h.rng, run.id, run.id, run.id, run.id, run.id, run.id, nobody)
	}
	if named := h.rng.Intn(5); named == 2 || named == 3 {
		known = pick(h.rng, known, known, known, modelDay-6*hour, modelDay+1)
		text := h.when(known)
		u.Known = &text
	}
	raw := func(v any) *json.RawMessage {
		text, _ := json.Marshal(v)
		return (*json.RawMessage)(&text)
	}
	value, note := h.value(), pick(h.rng, any("x"), any(" y "), any("  "), nil)
	tags := pick(h.rng, []string{}, nil, []string{" B", "a", "A "}, []string{"c"})
	mask := 1 + h.rng.Intn(7)
	if mask&1 != 0 {
		u.Value = raw(value)
	}
	if mask&2 != 0 {
		u.Note = raw(note)
	}
	if mask&4 != 0 {
		u.Tags = raw(tags)
	}

	if !seriesKnown {
		return u, next, false, 404
	}
	var found *modelVersion
	for i := range h.versions {
		w := &h.versions[i]
		if w.series == name && w.time == t && w.end == end && (u.RunID == "" || h.runs[w.run].id == u.RunID) &&
			(u.Known == nil || h.runs[w.run].known == known) && (found == nil || h.later(*w, *found)) {
			found = w
		}
	}
	if found != nil {
		next = *found
	} else {
		next = modelVersion{series: name, run: -1, time: t, end: end}
		for i, r := range h.runs {
			if (u.RunID != "" || u.Known != nil) && (u.RunID == "" || r.id == u.RunID) && (u.Known == nil || r.known == known) {
				next.run = i
			}
		}
		switch {
		case next.run < 0:
			return u, next, false, 404
		case u.Value == nil:
			return u, next, false, 422
		}
	}
	if u.Value != nil {
		next.value = value
	}
	if u.Note != nil {
		text, _ := note.(string)
		next.note = strings.TrimSpace(text)
	}
	if u.Tags != nil {
		next.tags = map[int][]string{3: {"a", "b"}, 1: {"c"}, 0: nil}[len(tags)]
	}
	if found != nil && (next.value == nil) == (found.value == nil) && (next.value == nil || *next.value == *found.value) &&
		next.note == found.note && slices.Equal(next.tags, found.tags) {
		return u, next, true, 200
	}
	next.by = h.email(user)
	next.number++
	return u, next, false, 200
}

// correct sends a random batch of updates.
func (h *history) correct(user int) error {
	var sent []modelUpdate
	var refused []int
	type change struct {
		modelVersion
		same bool
	}
	var changes []change
	last := map[string]int{}
	place := func(v modelVersion) string { return fmt.Sprint(v.series, v.run, v.time, v.end) }
	for range 1 + h.rng.Intn(4) {
		u, next, same, status := h.update(user)
		sent = append(sent, u)
		if status != 200 {
			refused = append(refused, status)
		}
		last[place(next)] = len(changes)
		changes = append(changes, change{next, same})
	}
	text, _ := json.Marshal(map[string]any{"updates": sent})
	resp, answer, err := h.s.do("PUT", "/values", h.keys[user], string(text))
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		if !slices.Contains(refused, resp.StatusCode) {
			return fmt.Errorf("PUT /values %s: status %d, want one of %v: %s", text, resp.StatusCode, refused, answer)
		}
		return nil
	}
	var want, got [2][]string // updated, skipped
	for i, c := range changes {
		if last[place(c.modelVersion)] != i {
			continue // the last of two equal keys wins
		}
		line := fmt.Sprint(h.runs[c.run].id, h.tenant, iso(c.time), h.series[c.series].id, c.number, !c.same)
		if c.same {
			want[1] = append(want[1], line)
		} else {
			want[0] = append(want[0], line)
			h.versions = append(h.versions, c.modelVersion)
		}
	}
	type result struct {
		Run     string    `json:"run_id"`
		Tenant  string    `json:"tenant_id"`
		Time    time.Time `json:"valid_time"`
		Series  string    `json:"series_id"`
		ID      *int64    `json:"value_id"`
		Version int       `json:"version"`
	}
	var body struct {
		Updated []result `json:"updated"`
		Skipped []result `json:"skipped_no_ops"`
	}
	if err := json.Unmarshal([]byte(answer), &body); err != nil || resp.StatusCode != 200 || body.Updated == nil || body.Skipped == nil {
		return fmt.Errorf("PUT /values %s: status %d: %s", text, resp.StatusCode, answer)
	}
	for i, list := range [][]result{body.Updated, body.Skipped} {
		for _, r := range list {
			got[i] = append(got[i], fmt.Sprint(r.Run, r.Tenant, iso(r.Time.UnixMicro()), r.Series, r.Version, r.ID != nil))
		}
		slices.Sort(got[i])
		slices.Sort(want[i])
		if !slices.Equal(got[i], want[i]) {
			return fmt.Errorf("PUT /values %s\nanswers %s\nwant updated %q, skipped %q", text, answer, want[0], want[1])
		}
	}
	return nil
}

// question makes a random query.
func (h *history) question() url.Values {
	q := url.Values{}
	chance := func(percent int) bool { return h.rng.Intn(100) < percent }
	if chance(40) {
		start := modelDay + int64(h.rng.Intn(6))*hour
		q.Set("start_valid", iso(start))
		if chance(60) {
			q.Set("end_valid", iso(start+int64(1+h.rng.Intn(5))*hour))
		}
	}
	if chance(20) {
		q.Set("start_known", iso(modelDay-int64(h.rng.Intn(4))*6*hour))
	}
	if chance(20) {
		q.Set("end_known", iso(modelDay+1-int64(h.rng.Intn(3))*6*hour))
		if q.Get("end_known") <= q.Get("start_known") {
			q.Del("start_known")
		}
	}
	if chance(20) {
		q.Set("lead", pick(h.rng, "1h", "PT6H", "P1D", "PT20H30M", "0s"))
	}
	for range h.rng.Intn(3) {
		name := pick(h.rng, "a", "b", "c")
		if x, known := h.series[name]; known && chance(50) {
			q.Add("series_id", x.id)
		} else {
			q.Add("series_key", name)
		}
	}
	if chance(20) {
		q.Set("bucket", pick(h.rng, "2h", "PT3H", "P1D", "7m", "P1W"))
		q.Set("agg", pick(h.rng, "mean", "min", "max", "sum", "count"))
		return q
	}
	for name, value := range map[string]string{"mode": pick(h.rng, "flat", "overlapping"),
		"detail": pick(h.rng, "true", "false"), "all_versions": pick(h.rng, "true", "false", "false")} {
		if value != "false" {
			q.Set(name, value)
		}
	}
	return q
}

// expect is what the model answers to q when it knew so many versions and moments; false means 404.
func (h *history) expect(q url.Values, versions, moments int) ([]string, bool) {
	wanted := map[string]bool{}
	for name, x := range h.series {
		if len(q["series_id"])+len(q["series_key"]) == 0 || slices.Contains(q["series_id"], x.id) ||
			slices.Contains(q["series_key"], name) {
			wanted[name] = true
		}
		if slices.Contains(q["series_id"], x.id) && x.born > moments {
			return nil, false
		}
	}
	for _, name := range q["series_key"] {
		if x, known := h.series[name]; !known || x.born > moments {
			return nil, false
		}
	}
	bound := func(name string, otherwise int64) int64 {
		if t, err := time.Parse(time.RFC3339Nano, q.Get(name)); err == nil {
			return t.UnixMicro()
		}
		return otherwise
	}
	lead, asked := map[string]int64{"1h": hour, "PT6H": 6 * hour, "P1D": 24 * hour, "PT20H30M": 41 * hour / 2, "0s": 0}[q.Get("lead")]
	if !asked {
		lead = math.MinInt64
	}
	overlapping, all := q.Get("mode") == "overlapping", q.Get("all_versions") == "true"
	best := map[string]modelVersion{}
	for i, v := range h.versions[:versions] {
		known := h.runs[v.run].known
		if !wanted[v.series] || v.time < bound("start_valid", math.MinInt64) || v.time >= bound("end_valid", math.MaxInt64) ||
			known < bound("start_known", math.MinInt64) || known >= bound("end_known", math.MaxInt64) || v.time-known < lead {
			continue
		}
		rival := fmt.Sprint(v.series, v.time, v.end)
		if all {
			rival = strconv.Itoa(i)
		} else if overlapping {
			rival += fmt.Sprint(" of run ", v.run)
		}
		if w, is := best[rival]; !is || h.later(v, w) {
			best[rival] = v
		}
	}
	if q.Has("bucket") {
		return h.buckets(q, best), true
	}
	var lines []string
	for _, v := range best {
		row := answerRow{Key: v.series, Series: h.series[v.series].id, Valid: time.UnixMicro(v.time), Value: v.value}
		if end := time.UnixMicro(v.end); v.end != 0 {
			row.End = &end
		}
		known := time.UnixMicro(h.runs[v.run].known)
		if overlapping || all || q.Get("detail") == "true" {
			row.Known = &known
		}
		if all || q.Get("detail") == "true" {
			row.Run, row.Version, row.ChangedBy, row.Tags = h.runs[v.run].id, v.number, &v.by, v.tags
			if v.note != "" {
				row.Annotation = &v.note
			}
		}
		lines = append(lines, row.line())
	}
	return lines, true
}

// buckets aggregates what a flat read shows. The values are multiples of a half, so sums do not depend on their order.
func (h *history) buckets(q url.Values, shown map[string]modelVersion) []string {
	width := map[string]int64{"2h": 2 * hour, "PT3H": 3 * hour, "P1D": 24 * hour, "7m": 7 * hour / 60, "P1W": 168 * hour}[q.Get("bucket")]
	type place struct {
		series string
		start  int64
	}
	values := map[place][]float64{}
	for _, v := range shown {
		if v.value != nil {
			p := place{v.series, v.time - v.time%width}
			values[p] = append(values[p], *v.value)
		}
	}
	var lines []string
	for p, list := range values {
		sum := 0.0
		for _, f := range list {
			sum += f
		}
		value := map[string]float64{"mean": sum / float64(len(list)), "min": slices.Min(list), "max": slices.Max(list), "sum": sum,
			"count": float64(len(list))}[q.Get("agg")]
		row := answerRow{Key: p.series, Series: h.series[p.series].id, Valid: time.UnixMicro(p.start), Value: &value}
		lines = append(lines, row.line())
	}
	return lines
}

// line is all of a row but when it was changed, so that equal rows have equal lines.
func (r answerRow) line() string {
	text := func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}
	when := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return iso(t.UnixMicro())
	}
	return strings.Join([]string{r.Key, when(&r.Valid), when(r.End), text(r.Value), r.Series, when(r.Known), r.Run,
		strconv.Itoa(r.Version), text(r.ChangedBy), text(r.Annotation), strings.Join(r.Tags, ",")}, " ")
}

// compare asks the server and the model the same, and returns the server's answer.
func (h *history) compare(q url.Values, versions, moments int) (string, error) {
	wanted, found := h.expect(q, versions, moments)
	resp, text, err := h.s.do("GET", "/values?"+q.Encode(), h.keys[0], "")
	if err != nil || found != (resp.StatusCode == 200) || !found && resp.StatusCode != 404 {
		return "", fmt.Errorf("GET /values?%s: %v %v %s, want found %v", q.Encode(), resp, err, text, found)
	}
	if !found {
		return text, nil
	}
	var got readAnswer
	var raw struct{ Data []json.RawMessage }
	if err := cmp.Or(json.Unmarshal([]byte(text), &got), json.Unmarshal([]byte(text), &raw)); err != nil {
		return "", err
	}
	lines := make([]string, len(got.Data))
	for i, r := range got.Data {
		lines[i] = r.line()
		if i > 0 && !inOrder(q, got.Data[i-1], r) {
			return "", fmt.Errorf("GET /values?%s: out of order: %s, then %s", q.Encode(), lines[i-1], lines[i])
		}
	}
	slices.Sort(lines)
	slices.Sort(wanted)
	if !slices.Equal(lines, wanted) || got.Count != len(lines) {
		return "", fmt.Errorf("GET /values?%s\nshows %d rows %q\nwant  %d rows %q", q.Encode(), got.Count, lines, len(wanted), wanted)
	}
	if len(lines) > 1 && h.rng.Intn(4) == 0 { // a limit shows the first rows of the same
		limit := 1 + h.rng.Intn(len(lines))
		var part struct{ Data []json.RawMessage }
		_, limited, err := h.s.do("GET", fmt.Sprintf("/values?%s&limit=%d", q.Encode(), limit), h.keys[0], "")
		if err != nil || json.Unmarshal([]byte(limited), &part) != nil || len(part.Data) != limit ||
			!slices.EqualFunc(part.Data, raw.Data[:limit], func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) {
			return "", fmt.Errorf("GET /values?%s with limit=%d: %v %s\nwithout %s", q.Encode(), limit, err, limited, text)
		}
	}
	return text, nil
}

// inOrder tells whether b may follow a. Of overlapping runs known at one time each is in order by itself;
// TestOverlappingRunsOfOneKnownTimeAreOrderedByValidTime says more.
func inOrder(q url.Values, a, b answerRow) bool {
	order := strings.Compare(a.Key, b.Key)
	if q.Get("mode") == "overlapping" {
		if order = cmp.Or(order, a.Known.Compare(*b.Known)); order == 0 && a.Run != b.Run || a.Run == "" {
			return order <= 0
		}
	}
	order = cmp.Or(order, a.Valid.Compare(b.Valid))
	if q.Get("all_versions") == "true" {
		order = cmp.Or(order, cmp.Compare(a.Version, b.Version))
	}
	return order <= 0
}

// ---- Correct

// update is an entry of PUT /values on load at midnight, with these members.
func update(members string) string {
	return `{"updates":[{"series_key":"load","valid_time":"2025-01-01T00:00:00Z",` + members + `}]}`
}

func TestCorrectionKeepsWhatIsAbsentAndClearsWhatIsNull(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, second := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantA, "b@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	version := 1
	for _, c := range []struct{ members, want string }{ // value, annotation, tags after it; "" if it changes nothing
		{`"annotation":"  checked by hand  "`, `1 "checked by hand" null`}, {`"value":1`, ``},
		{`"annotation":"checked by hand","value":1.0`, ``},
		{`"tags":["b"," A ","a","B"]`, `1 "checked by hand" ["a","b"]`}, {`"tags":["A","b"]`, ``},
		{`"value":2.5`, `2.5 "checked by hand" ["a","b"]`},
		{`"value":null`, `null "checked by hand" ["a","b"]`}, {`"value":null,"tags":["b","a"]`, ``},
		{`"annotation":null`, `null null ["a","b"]`}, {`"annotation":" \n"`, ``},
		{`"tags":null`, `null null null`}, {`"tags":[]`, ``}, {`"value":-3,"annotation":"x","tags":["ü"]`, `-3 "x" ["ü"]`},
		{`"annotation":"","value":0,"tags":[]`, `0 null null`},
	} {
		answer := s.must(t, 200, "PUT", "/values", second, update(c.members))
		var n int
		if n = strings.Count(answer, `"value_id"`); c.want != "" {
			version++
		}
		if (n == 1) != (c.want != "") || !strings.Contains(answer, fmt.Sprintf(`"version":%d`, version)) ||
			!strings.Contains(answer, tenantA) ||
			(c.want == "") == strings.Contains(answer, `"skipped_no_ops":[]`) {
			t.Errorf("%s: answer %s, want version %d", c.members, answer, version)
		}
		got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?detail=true", key, "")).Data[0]
		text, _ := json.Marshal([]any{got.Value, got.Annotation, got.Tags})
		if want := "[" + strings.ReplaceAll(c.want, " ", ",") + "]"; c.want != "" &&
			strings.ReplaceAll(string(text), " ", ",") != want || *got.ChangedBy != "b@example.com" || got.Version != version {
			t.Errorf("%s leads to %s version %d by %s, want %s version %d", c.members, text, got.Version, *got.ChangedBy, c.want, version)
		}
	}
	all := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?all_versions=true", key, ""))
	if all.Count != version || *all.Data[0].ChangedBy != "a@example.com" || *all.Data[0].Value != 1 {
		t.Errorf("the history has %d versions, want %d, and begins with %+v", all.Count, version, all.Data[0])
	}
	if got := mustQuery(t, s.db, `SELECT concat_ws(' ', count(*), min(value), min(version)) FROM current_values`); got != fmt.Sprint("1 0 ", version) {
		t.Errorf("the view current_values shows %q", got)
	}
}

func TestCorrectionFindsTheValueThatItNames(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	runs := strings.Fields(mustQuery(t, s.db, `SELECT string_agg(run_id::text, ' ' ORDER BY inserted_at) FROM runs_table`))
	const one, end = `{"valid_time":"2025-01-01T01:00:00Z",`, `"valid_time":"2025-01-01T00:00:00Z","valid_time_end":"2025-01-01T02:00:00Z",`
	s.mustAll(t, key, []httpCase{
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":7}]}`, 200, []string{runs[1], `"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":8,"run_id":"` + strings.ToUpper(runs[0]) + `"}]}`, 200, []string{runs[0], `"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_id":"` + series["load"] + `","value":9,"known_time":"2024-12-31 01:00+01:00"}]}`, 200, []string{runs[0], `"version":3`}},
		{"PUT", "/values", `{"updates":[{` + end + `"series_key":"price","value":21}]}`, 200, []string{`"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"wind","run_id":"` + runs[0] + `","value":6,"annotation":"late"}]}`, 200, []string{`"version":1`}}, // the run gains it
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"wind","run_id":"` + runs[1] + `","value":null}]}`, 200, []string{`"version":1`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":1},` + one + `"series_key":"load","value":2}]}`, 200, []string{`"version":3`}}, // the last counts
		{"PUT", "/values", `{"updates":[]}`, 200, []string{`"updated":[]`, `"skipped_no_ops":[]`}},
	})
	const want = "00/load 00=1 v1, 00/load 01=9 v3, 00/load 02=null v1, 12/load 01=2 v3, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1, " +
		"12/price 00-01=10 v1, 12/price 00-02=21 v2, 00/wind 00=0.5 v1, 00/wind 01=6 v1, 12/wind 01=null v1"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping&detail=true", key, "")); got != want {
		t.Errorf("after the corrections\nit is %s\nwant  %s", got, want)
	}
	before := s.stored(t)
	good := one + `"series_key":"load","value":55},`
	for _, c := range []struct {
		bad    string
		status int
		want   string
	}{
		{`{"valid_time":"2025-01-05","series_key":"load","value":1}`, 404, "updates[1]"}, {one + `"series_key":"nope","value":1}`, 404, "series_key"}, {one + `"series_id":"` + nobody + `","value":1}`, 404, "series_id"},
		{one + `"series_key":"load","valid_time_end":"2025-01-01T02:00:00Z","value":1}`, 404, "updates[1]"}, {`{"valid_time":"2025-01-01T00:00:00Z","series_key":"price","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"load","run_id":"` + nobody + `","value":1}`, 404, "updates[1]"}, {one + `"series_key":"load","known_time":"2024-01-01","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"load","run_id":"` + runs[0] + `","known_time":"2024-12-31T12:00:00Z","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"price","run_id":"` + runs[0] + `","annotation":"x"}`, 422, "value"}, {one + `"series_key":"load"}`, 422, "updates[1]"}, {one + `"value":1}`, 422, "series"},
		{`{"series_key":"load","value":1}`, 422, "valid_time"}, {`{"valid_time":"soon","series_key":"load","value":1}`, 422, "valid_time"}, {one + `"series_key":"load","value":"1"}`, 422, "value"},
		{one + `"series_key":"load","value":1e999}`, 422, "value"}, {one + `"series_key":"load","value":NaN}`, 422, "updates[1]"}, {one + `"series_key":"load","value":1,"extra":1}`, 422, "extra"},
		{one + `"series_key":"load","tags":"x"}`, 422, "tags"}, {one + `"series_key":"load","tags":[5]}`, 422, "tags"}, {one + `"series_key":"load","tags":[null,"x"]}`, 422, "tags"},
		{one + `"series_key":"load","tags":["x"` + strings.Repeat(`,"x"`, maxTags) + `]}`, 422, "tags"}, {one + `"series_key":"load","tags":"x"}`, 422, "list of texts"}, {one + `"series_key":"load","tags":["a\u0000"]}`, 422, "tags"},
		{one + `"series_key":"load","annotation":5}`, 422, "annotation"}, {one + `"series_key":"load","annotation":"\u0000"}`, 422, "annotation"}, {one + `"series_key":"load","run_id":"x","value":1}`, 422, "run_id"},
		{one + `"series_key":"wind","series_id":"` + series["load"] + `","value":1}`, 422, "wind"}, {one + `"series_key":"load","valid_time_end":"2025-01-01","value":1}`, 422, "valid_time_end"},
		{one + `"series_key":"load","known_time":"x","value":1}`, 422, "known_time"}, {one + `"series_key":"load","tenant_id":"` + tenantB + `","value":1}`, 403, "tenant_id"}, {`5`, 422, "updates[1]"}, {`null`, 422, "updates[1]"},
	} {
		if text := s.must(t, c.status, "PUT", "/values", key, `{"updates":[`+good+c.bad+`]}`); !strings.Contains(text, c.want) {
			t.Errorf("%s: %s, want %s in it", c.bad, text, c.want)
		}
		if s.stored(t) != before {
			t.Fatalf("%s: refused, and yet something was stored", c.bad)
		}
	}
	s.mustAll(t, key, []httpCase{
		{"PUT", "/values", `{`, 422, []string{"body"}}, {"PUT", "/values", `[]`, 422, []string{"body"}}, {"PUT", "/values", `{"updates":{}}`, 422, []string{"updates"}}, {"PUT", "/values", `{"updates":[],"x":1}`, 422, []string{"x"}},
		{"PUT", "/values", `{"updates":[],"updates":[]}`, 422, []string{"updates"}}, {"PUT", "/values", `{"Updates":[]}`, 422, []string{"Updates"}}, {"PUT", "/values?x=1", `{"updates":[]}`, 422, []string{"x"}},
	})
	s.must(t, 415, "PUT", "/values", key, "a,b", "Content-Type: text/csv")
}

func TestManyCorrectionsAreOneRequest(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 3000
	mustManyValues(t, s, key, n)
	var updates []string
	for i := range n {
		at := time.Date(2020, 1, 1, 0, i, 0, 0, time.UTC).Format(time.RFC3339)
		updates = append(updates, fmt.Sprintf(`{"series_key":"load","valid_time":%q,"value":%d.5}`, at, i))
	}
	text := s.must(t, 200, "PUT", "/values", key, `{"updates":[`+strings.Join(updates, ",")+`]}`)
	got := mustDecode[struct {
		Updated []struct {
			ID      int64     `json:"value_id"`
			Time    time.Time `json:"valid_time"`
			Version int
		}
	}](t, text)
	ids := map[int64]bool{}
	for i, u := range got.Updated {
		if ids[u.ID] = true; u.Version != 2 || !u.Time.Equal(time.Date(2020, 1, 1, 0, i, 0, 0, time.UTC)) {
			t.Fatalf("updated[%d] is %+v", i, u)
		}
		if stored := i % 500; stored == 0 && mustQuery(t, s.db, `SELECT valid_from = $2 FROM values_table WHERE value_id = $1`,
			u.ID, u.Time) != "true" {
			t.Errorf("value_id of updated[%d] is another row's", i)
		}
	}
	if len(ids) != n {
		t.Errorf("%d value_ids, want %d", len(ids), n)
	}
	for i, row := range mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", key, "")).Data {
		if *row.Value != float64(i)+0.5 {
			t.Fatalf("after the corrections row %d is %v", i, *row.Value)
		}
	}
}

func TestConcurrentCorrectionsOfOneValueAreAllKept(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	together(8, func(i int) {
		resp, text, err := s.do("PUT", "/values", key, update(fmt.Sprintf(`"value":%d`, 100+i)))
		if err != nil || resp.StatusCode != 200 || !strings.Contains(text, "value_id") {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	if got := mustQuery(t, s.db, `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table`); got != "1 2 3 4 5 6 7 8 9" {
		t.Errorf("the versions are %s", got)
	}
	together(2, func(i int) { s.do("PUT", "/values", key, update(`"tags":["t`+strconv.Itoa(i)+`"]`)) })
	if got := mustQuery(t, s.db, `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table WHERE tags IS NOT NULL`); got != "10 11" {
		t.Errorf("two at once made the versions %s", got)
	}
}

// ---- Document

type object = map[string]any

// document is web/openapi.json: its text, which alone knows the order of members, and what it says.
type document struct {
	t          *testing.T
	text       string
	root       object
	operations map[string]object // by "METHOD path"
	seen       map[string]bool   // answers that were checked, as "METHOD path status type"
}

func mustDocument(t *testing.T) *document {
	t.Helper()
	text, _ := web.ReadFile("web/openapi.json")
	d := &document{t, string(text), mustDecode[object](t, string(text)), map[string]object{}, map[string]bool{}}
	for path, item := range d.at(d.root, "paths") {
		for method, operation := range d.at(item) {
			d.operations[strings.ToUpper(method)+" "+path] = d.at(operation)
		}
	}
	return d
}

// at follows members from a node down, and any $ref on the way. What is not there is an empty object.
func (d *document) at(node any, names ...string) object {
	found, _ := node.(object)
	if ref, ok := found["$ref"].(string); ok {
		return d.at(d.root, append(strings.Split(strings.TrimPrefix(ref, "#/"), "/"), names...)...)
	}
	if len(names) > 0 {
		return d.at(found[names[0]], names[1:]...)
	}
	return found
}

// absent stands for a member that is not there: it satisfies every schema, but shows broken all keywords of it.
type absent struct{}

var jsonTypes = map[string]string{"<nil>": "null", "bool": "boolean", "string": "string", "float64": "number",
	"[]interface {}": "array", "map[string]interface {}": "object"}

// broken says what a decoded JSON value has that its schema does not allow. It knows the keywords that the document uses and
// fails the test at any other, so that none can be written that nothing checks.
func (d *document) broken(schema object, value any) (err error) {
	members, isObject := value.(object)
	elements, isList := value.([]any)
	text, isText := value.(string)
	size, sized := value.(float64) // of a number, or the length
	if isText || isList {
		size, sized = float64(max(len([]rune(text)), len(elements))), true
	}
	within := func(schema, value any) { err = cmp.Or(err, d.broken(schema.(object), value)) }
	for keyword, want := range schema {
		ok := true
		limit, _ := want.(float64)
		list, _ := want.([]any)
		switch keyword {
		case "title", "description", "default", "example", "examples", "contentMediaType":
		case "$ref":
			within(d.at(schema), value)
		case "type":
			list, kind := append(list, want), jsonTypes[fmt.Sprintf("%T", value)]
			ok = slices.Contains(list, any(kind)) || kind == "number" && size == math.Trunc(size) && slices.Contains(list, any("integer"))
		case "const":
			ok = value == want
		case "enum":
			ok = slices.Contains(list, value)
		case "format":
			_, notTime := time.Parse(time.RFC3339, text)
			ok = !isText || want == "date-time" && notTime == nil || want == "uuid" && uuidPattern.MatchString(text)
		case "pattern":
			ok = !isText || regexp.MustCompile(want.(string)).MatchString(text)
		case "minimum", "minLength", "minItems":
			ok = !sized || size >= limit
		case "maximum", "maxLength", "maxItems":
			ok = !sized || size <= limit
		case "items":
			for _, element := range append(slices.Clone(elements), absent{}) {
				within(want, element)
			}
		case "required":
			for _, name := range list {
				_, given := members[name.(string)]
				ok = ok && (given || !isObject)
			}
		case "properties":
			for name, property := range d.at(want) {
				member, given := members[name]
				within(property, map[bool]any{true: member, false: absent{}}[given])
			}
		case "additionalProperties":
			within(d.at(want), absent{})
			for name, member := range members {
				if d.at(schema, "properties")[name] == nil {
					ok = ok && want != false
					within(d.at(want), member)
				}
			}
		case "anyOf", "allOf":
			kept := slices.DeleteFunc(slices.Clone(list), func(s any) bool { return d.broken(s.(object), value) != nil })
			ok = len(kept) == len(list) || keyword == "anyOf" && len(kept) > 0
		default:
			d.t.Fatalf("this test does not know the keyword %s", keyword)
		}
		if value != any(absent{}) && !ok {
			err = fmt.Errorf("%s %.200v is broken by %.200v", keyword, want, value)
		}
	}
	return err
}

// check looks whether an answer to an operation, such as "GET /values", is as the document says, and returns its body.
func (d *document) check(operation string, resp *http.Response, body string) string {
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	d.seen[fmt.Sprint(operation, " ", resp.StatusCode, " ", kind)] = true
	described := d.at(d.operations[operation], "responses", strconv.Itoa(resp.StatusCode))
	var value any = body
	if json.Unmarshal([]byte(body), &value) != nil && kind == "application/json" {
		d.t.Errorf("%s: no JSON: %q", operation, body)
	}
	schema := d.at(described, "content", kind, "schema")
	err := d.broken(schema, value)
	for name, header := range d.at(described, "headers") {
		err = cmp.Or(err, d.broken(d.at(header, "schema"), resp.Header.Get(name)))
	}
	if err != nil || len(schema) == 0 {
		d.t.Errorf("%s: the document does not describe status %d with %s: %v: %.500s", operation, resp.StatusCode, kind, err, body)
	}
	return body
}

// try sends a request, such as "GET /values?limit=1", which must be answered with the status want and as described.
func (d *document) try(s *testServer, want int, request, key, body string, header ...string) string {
	method, path, _ := strings.Cut(request, " ")
	operation, _, _ := strings.Cut(request, "?")
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil || resp.StatusCode != want {
		d.t.Fatalf("%s %.300s: %v %v %s, want %d", request, body, err, resp, text, want)
	}
	return d.check(operation, resp, text)
}

func TestDocumentListsTheRoutesAndWhatTheyNeed(t *testing.T) {
	d := mustDocument(t)
	routes, described := map[string]bool{}, map[string]bool{} // whether they are open
	for _, rt := range (&server{}).routes() {
		routes[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access == "open"
	}
	for name, operation := range d.operations {
		security, own := operation["security"].([]any) // without its own the document's holds
		described[name] = own && len(security) == 0
	}
	if !reflect.DeepEqual(routes, described) || fmt.Sprint(d.root["security"]) != "[map[ApiKey:[]]]" {
		t.Errorf("the document describes %v, by security %v; the routes are %v", described, d.root["security"], routes)
	}
	if n := strings.Count(d.text, `"version": "`); n == 0 || n != strings.Count(d.text, `"version": "`+release+`"`) {
		t.Errorf("the document is not of version %s", release)
	}
}

// Every answer that can be provoked must be described, and every one that is described must be provoked.
func TestDocumentDescribesEveryAnswerAndNoOther(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	readOnly, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "--read-only", "-t", tenantA, "-e", "r@example.com")
	named := `"run_id":"` + nobody + `",`
	for _, c := range []struct {
		status        int
		request, body string
	}{
		{200, "GET /", ""}, {200, "GET /healthz", ""}, {200, "GET /docs", ""}, {200, "GET /openapi.json", ""},
		{200, "GET /list_timeseries", ""}, {200, "GET /runs", ""}, {200, "GET /values", ""}, {200, "POST /upload", oneValue},
		{200, "POST /upload", runWith(named + `"run_params":{"n":[1]},"series_descriptions":null,`)},
		{200, "POST /upload", runWith("", at("2025-01-02", "null"), at("2025-01-03", "1e300", `,"valid_time_end":"2025-01-04"`))},
		{200, "PUT /values", update(`"value":2.5,"annotation":"why","tags":["b","A"]`)}, {200, "PUT /values", update(`"value":2.5`)},
		{200, "POST /series", `{"name":"s","unit":"MW","description":"d"}`}, {200, "POST /series", `{"name":"s","unit":"MW"}`},
		{200, "GET /values?limit=3", ""}, {200, "GET /values?detail=true", ""}, {200, "GET /values?all_versions=1&mode=overlapping", ""},
		{200, "GET /values?bucket=1h&agg=count", ""}, {200, "GET /values?format=csv&detail=true", ""},
		{200, "GET /values?mode=overlapping&format=csv", ""}, {200, "GET /list_timeseries", ""}, {200, "GET /runs", ""},
		{404, "POST /upload", runWith("", `{"valid_time":"2025-01-01","series_id":"`+nobody+`","value":1}`)},
		{404, "GET /values?series_key=nope", ""}, {404, "PUT /values", strings.Replace(update(`"value":1`), "load", "nope", 1)},
		{409, "POST /upload", runWith(named, at("2025-01-01", "1"))}, {409, "POST /series", `{"name":"s","unit":"kW"}`},
	} {
		d.try(s, c.status, c.request, key, c.body)
	}
	raw := func(s *testServer, operation, request string) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, request)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		d.check(operation, resp, string(body))
	}
	raw(s, "GET /values", "GET /values HTTP/1.0\r\nX-API-Key: "+key+"\r\n\r\n")
	without := func(failure error, patience time.Duration) *testServer { // a server without a database; patience: for a body
		usersTable := func(context.Context) (bool, error) { return false, failure }
		hs := httptest.NewUnstartedServer(newServer(nil, usersTable, &authenticator{usersTableExists: usersTable}, slog.New(slog.DiscardHandler)))
		hs.Config.ReadTimeout = patience
		hs.Start()
		t.Cleanup(hs.Close)
		return &testServer{url: hs.URL, client: hs.Client()}
	}
	down, bug, hasty := without(io.EOF, 0), without(nil, 0), without(nil, 100*time.Millisecond)
	d.try(down, 503, "GET /healthz", "", "")
	d.try(without(errors.New("a bug"), 0), 500, "GET /healthz", "", "")
	bodies := map[string]string{"POST /upload": oneValue, "PUT /values": update(`"value":1`), "POST /series": `{"name":"x"}`}
	tooLarge := gzipped(`{"` + strings.Repeat("x", maxBody)) // one long name: it is read the fastest
	for operation, spec := range d.operations {
		if spec["security"] != nil {
			continue
		}
		body := bodies[operation]
		d.try(s, 401, operation, "", body)
		d.try(s, 403, operation+"?tenant_id="+tenantB, key, body)
		d.try(s, 422, operation+"?nope=1", key, body)
		d.try(bug, 500, operation, "", body)
		d.try(down, 503, operation, "", body)
		if body != "" {
			d.try(s, 403, operation, strings.TrimSpace(readOnly), body)
			d.try(s, 413, operation, key, tooLarge, "Content-Encoding: gzip")
			d.try(s, 415, operation, key, body, "Content-Type: text/plain")
			raw(hasty, operation, operation+" HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
		}
	}
	for operation, spec := range d.operations {
		method, path, _ := strings.Cut(operation, " ")
		for tries := 0; spec["security"] == nil && tries < 3*failureBurst && !d.seen[operation+" 429 application/json"]; tries++ {
			resp, text, err := s.do(method, path, "x", "")
			if err != nil {
				t.Fatal(err)
			}
			d.check(operation, resp, text)
		}
		for status, answer := range d.at(spec, "responses") {
			for kind := range d.at(answer, "content") {
				if !d.seen[operation+" "+status+" "+kind] {
					t.Errorf("%s is said to answer %s with %s, which it never did", operation, status, kind)
				}
			}
		}
	}
}

// examples calls fn with each example and default under a node, and with its schema.
func (d *document) examples(node any, fn func(schema object, example any)) {
	members, _ := node.(object)
	elements, _ := node.([]any)
	list, _ := members["examples"].([]any) // of a schema itself
	if standard, given := members["default"]; given {
		list = append(list, standard)
	}
	for _, example := range list {
		fn(members, example)
	}
	if schema := d.at(members["schema"]); len(schema) > 0 { // of a parameter, a header or a body
		if example, given := members["example"]; given || len(d.at(members, "examples")) == 0 {
			fn(schema, example)
		}
		for _, example := range d.at(members, "examples") {
			fn(schema, d.at(example)["value"])
		}
	}
	for _, child := range slices.AppendSeq(elements, maps.Values(members)) {
		d.examples(child, fn)
	}
}

func TestExamplesOfTheDocumentFitTheirSchemas(t *testing.T) {
	d, count := mustDocument(t), 0
	d.examples(d.root, func(schema object, example any) {
		count++
		if err := d.broken(schema, example); err != nil {
			t.Errorf("the example %.200v does not fit its schema: %v", example, err)
		}
	})
	if count < 80 {
		t.Errorf("only %d examples were found", count)
	}
}

var variesInAnswers = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|"(change_time|inserted_at|value_id)":[^,}]*`)

// essence is what must be the same in two answers to one request: no ids, no times of writing. The rest is in parts, sorted,
// because members may be in any order.
func essence(answer any) []string {
	constant := variesInAnswers.ReplaceAllString(asJSON(answer), "")
	parts := strings.FieldsFunc(constant, func(r rune) bool { return strings.ContainsRune("{},", r) })
	slices.Sort(parts)
	return parts
}

// The examples of requests are sent in the order in which they stand, as a reader of the docs page would; then the reads
// again, because the answers that are shown are those after all writes. x-query tells the parameters.
func TestExamplesOfTheDocumentAreAnsweredAsItShows(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, "3b241101-e2bb-4255-8caf-4136c566a962", "anna@example.com")
	type sending struct {
		request, kind, name string
		example, shown      object
	}
	var writes, reads []sending
	for request, spec := range d.operations {
		answers := d.at(spec, "responses", "200", "content")
		for kind, content := range d.at(spec, "requestBody", "content") {
			for name, example := range d.at(content, "examples") {
				writes = append(writes, sending{request, kind, name, d.at(example), d.at(answers, "application/json", "examples", name)})
			}
		}
		for kind, content := range answers {
			for name, example := range d.at(content, "examples") {
				if strings.HasPrefix(request, "GET ") {
					reads = append(reads, sending{request, kind, name, object{"x-query": d.at(example)["x-query"]}, d.at(example)})
				}
			}
		}
	}
	place := func(x sending) int { return strings.Index(d.text, strconv.Quote(x.name)+":") }
	all := append(writes, reads...)
	slices.SortFunc(all, func(x, y sending) int { return cmp.Compare(place(x), place(y)) })
	for i, x := range append(all, reads...) {
		query, body := url.Values{}, ""
		for name, value := range d.at(x.example, "x-query") {
			query.Set(name, value.(string))
		}
		switch value := x.example["value"].(type) {
		case string:
			body = value // CSV
		case object:
			body = asJSON(value)
		}
		text := d.try(s, 200, x.request+"?"+query.Encode(), key, body, "Content-Type: "+x.kind)
		var answer any = text
		_ = json.Unmarshal([]byte(text), &answer) // or it is CSV
		if (body != "" || i >= len(all)) && !slices.Equal(essence(answer), essence(x.shown["value"])) {
			t.Errorf("%s?%s %s: %s\nthe document shows %v", x.request, query.Encode(), body, text, x.shown["value"])
		}
	}
	if len(writes) < 6 || len(reads) < 6 {
		t.Errorf("only %d writes and %d reads were found", len(writes), len(reads))
	}
}

// The server names what it takes when it refuses a parameter, a field or a column that it does not know.
func TestDocumentNamesTheParametersAndFieldsThatThereAre(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for _, c := range []struct{ request, body, kind, schema string }{ // without a schema it is about parameters
		{"GET /values?nope=1", "", "", ""}, {"GET /runs?nope=1", "", "", ""}, {"GET /list_timeseries?nope=1", "", "", ""},
		{"POST /upload?nope=1", "x", "text/csv", ""}, {"PUT /values?nope=1", `{"updates":[]}`, "", ""},
		{"POST /series?nope=1", `{"name":"x"}`, "", ""}, {"POST /upload", `{"nope":1}`, "", "Upload"},
		{"POST /upload?run_start_time=2025-01-01", "nope", "text/csv", "UploadRow"}, {"PUT /values", `{"nope":1}`, "", "Updates"},
		{"PUT /values", `{"updates":[{"nope":1}]}`, "", "Update"}, {"POST /series", `{"nope":1}`, "", "NewSeries"},
	} {
		text := d.try(s, 422, c.request, key, c.body, "Content-Type: "+cmp.Or(c.kind, "application/json"))
		_, taken, _ := strings.Cut(strings.ReplaceAll(text, "also ", ""), "there are ")
		operation, _, _ := strings.Cut(c.request, "?")
		names := slices.Collect(maps.Keys(d.at(d.root, "components", "schemas", c.schema, "properties")))
		parameters, _ := d.operations[operation]["parameters"].([]any)
		for _, p := range parameters {
			if p := d.at(p); c.schema == "" && p["in"] == "query" {
				names = append(names, p["name"].(string))
			}
		}
		slices.Sort(names)
		if described := strings.Join(names, ", "); described+"\"}\n" != taken {
			t.Errorf("%s %s: the document names %s\nthe server takes %s", c.request, c.schema, described, taken)
		}
	}
}

// ---- SQL

// mustNorth uploads what the queries of docs/SQL.md ask for, as the page's tenant and with other values as tenant B, and runs the
// page's SQL for that tenant's role. It returns the page's queries as they then run, with Grafana's macros written out as the page
// says; and the database as that role.
func mustNorth(t *testing.T) (s *testServer, key string, queries []string, reader *sql.DB) {
	t.Helper()
	s = mustServer(t)
	key = s.mustUser(t, "7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37", "north@example.com")
	other := s.mustUser(t, tenantB, "b@example.com")
	day := func(value int, name string, step time.Duration) (csv string) { // from an hour before the day to an hour after it
		for at := -time.Hour; at <= 24*time.Hour; at += step {
			csv += fmt.Sprintf("%s,%s,%d\n", time.Date(2025, 1, 2, 0, 0, 0, 0, time.UTC).Add(at).Format(time.RFC3339), name, value+int(at/step))
		}
		return csv
	}
	now := time.Now().UTC().Truncate(time.Hour) // in the middle of a row of values_table
	later := fmt.Sprintf("%s,wind_measured,-7\n%s,wind_measured,-8\n", now.Format(time.RFC3339), now.Add(5*time.Hour).Format(time.RFC3339))
	for _, run := range []struct{ key, known, csv string }{
		{key, "2025-01-01T12:00Z", day(100, "wind_forecast", time.Hour)}, {key, "2025-01-02T06:00Z", day(200, "wind_forecast", time.Hour)},
		{key, "2025-01-03", day(90, "wind_measured", 20*time.Minute) + later},
		{other, "2025-01-01T13:00Z", day(700, "wind_forecast", time.Hour)}, {other, "2025-01-03", day(700, "wind_measured", time.Minute)},
	} {
		s.must(t, 200, "POST", "/upload?run_start_time=2025-01-01&known_time="+run.known, run.key,
			"valid_time,value_key,value\n"+run.csv, "Content-Type: text/csv")
	}
	correct := func(series, hour, value string) string {
		return `{"series_key":"` + series + `","valid_time":"2025-01-02T` + hour + `Z","value":` + value + `}`
	}
	s.must(t, 200, "PUT", "/values", key, `{"updates":[`+strings.Join([]string{correct("wind_measured", "05:20", "null"),
		correct("wind_measured", "07:00", "null"), correct("wind_measured", "07:20", "null"), correct("wind_measured", "07:40", "null"),
		strings.Replace(correct("wind_forecast", "03:00", "50"), "{", `{"known_time":"2025-01-01T12:00Z",`, 1)}, ",")+`]}`)
	page, err := os.ReadFile("docs/SQL.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)\n```sql\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	expanded := regexp.MustCompile("expand: `(.*)`, and `(.*)`").FindStringSubmatch(string(page))
	if len(blocks) != 5 || expanded == nil {
		t.Fatalf("docs/SQL.md has %d blocks of SQL and macros %q", len(blocks), expanded)
	}
	// A role belongs to the cluster, and this test's database has another name.
	role, password := fmt.Sprintf("timedb_test_north_%016x", rand.Uint64()), fmt.Sprintf("north-password-%x", rand.Uint64())
	database := strings.TrimPrefix(mustParse(t, s.dsn).Path, "/")
	names := strings.NewReplacer("north_reader", role, "DATABASE timedb", "DATABASE "+database)
	t.Cleanup(func() { mustExec(t, s.db, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	mustExec(t, s.db, "GRANT CREATE ON SCHEMA public TO PUBLIC") // as PostgreSQL 14 has it
	mustExec(t, s.db, names.Replace(blocks[3][1]))
	mustExec(t, s.db, "ALTER ROLE "+role+" PASSWORD '"+password+"'")
	macros := strings.NewReplacer("$__time(valid_time)", expanded[1], "$__timeFilter(valid_time)", expanded[2])
	for _, i := range []int{0, 1, 2, 4} {
		queries = append(queries, macros.Replace(blocks[i][1]))
	}
	return s, key, queries, mustOpen(t, databaseURL(database, url.UserPassword(role, password))+"&timezone=UTC")
}

func TestQueriesOfTheSQLDocumentAnswerAsTheAPIDoes(t *testing.T) {
	t.Parallel()
	s, key, queries, reader := mustNorth(t)
	const day = "/values?start_valid=2025-01-02&end_valid=2025-01-03&series_key="
	read := func(path string) []answerRow {
		return mustDecode[readAnswer](t, s.must(t, 200, "GET", path, key, "")).Data
	}
	type row = map[string]any
	want := make([][]row, len(queries))
	for _, r := range read(day + "wind_measured&bucket=PT1H&agg=mean") {
		want[0] = append(want[0], row{"hour": r.Valid, "mean": r.Value})
	}
	newest, measured := map[string]answerRow{}, map[time.Time]float64{}
	for _, r := range read("/values?end_valid=" + time.Now().UTC().Format(time.RFC3339)) {
		newest[r.Series] = r
	}
	for _, id := range slices.Sorted(maps.Keys(newest)) {
		r := newest[id]
		want[1] = append(want[1], row{"series_key": r.Key, "valid_time": r.Valid, "value": r.Value, "unit": r.Unit})
	}
	for _, r := range read(day + "wind_measured") {
		if want[3] = append(want[3], row{"time": r.Valid, "wind_measured": r.Value}); r.Value != nil {
			measured[r.Valid] = *r.Value
		}
	}
	for _, r := range read(day + "wind_forecast&end_known=2025-01-02") {
		if m, ok := measured[r.Valid]; ok {
			want[2] = append(want[2], row{"valid_time": r.Valid, "forecast": r.Value, "measured": m, "error": *r.Value - m})
		}
	}
	// What is known beforehand, so that the two are not wrong together.
	for i, known := range []string{`05:00:00Z","mean":106}`, `"value":-7}`, `{"error":-49,"forecast":50,"measured":99,`,
		`05:20:00Z","wind_measured":null}`} {
		wanted, _ := json.Marshal(want[i])
		if len(want[i]) != []int{23, 2, 23, 72}[i] || !strings.Contains(string(wanted), known) {
			t.Errorf("the API answers %d rows %s, want %s in it", len(want[i]), wanted, known)
		}
		query := "SELECT replace(json_agg(q)::text, '+00:00', 'Z') FROM (" + strings.TrimSuffix(queries[i], ";\n") + ") AS q"
		for name, db := range map[string]*sql.DB{"owner": mustOpen(t, s.dsn+"&timezone=UTC"), "role": reader} {
			if got, _ := json.Marshal(mustDecode[[]row](t, mustQuery(t, db, query))); string(got) != string(wanted) {
				t.Errorf("%s\nanswers the %s\n%s\nwant\n%s", queries[i], name, got, wanted)
			}
		}
	}
}

func TestSQLRoleOfATenantSeesItsTenantAndNothingElse(t *testing.T) {
	t.Parallel()
	s, _, _, reader := mustNorth(t)
	const north = "7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37"
	for _, view := range []string{"current_values", "values_table", "series_table"} {
		const digest = `SELECT concat(count(*), ' ', md5(string_agg(v::text, ',' ORDER BY v::text))) FROM `
		want := mustQuery(t, s.db, digest+"public."+view+" v WHERE tenant_id = $1", north)
		if got := mustQuery(t, reader, digest+view+" v"); got != want || strings.HasPrefix(got, "0") {
			t.Errorf("%s shows the role %s, want %s", view, got, want)
		}
	}
	// A function that tells what it is given, and that the planner would like to call first, is given no other tenant's rows.
	mustExec(t, s.db, `CREATE FUNCTION tell(tenant uuid) RETURNS boolean IMMUTABLE COST 0.0001 LANGUAGE plpgsql AS $$ BEGIN
		IF tenant <> '`+north+`' THEN RAISE EXCEPTION 'told of %', tenant; END IF; RETURN true; END $$`)
	for _, view := range []string{"current_values", "values_table", "series_table"} {
		mustExec(t, reader, `SET enable_indexscan = off; SET enable_bitmapscan = off; SELECT FROM `+view+` WHERE public.tell(tenant_id)`)
	}
	for _, refused := range []string{
		`SELECT FROM public.current_values`, `SELECT FROM public.values_table`, `SELECT FROM public.series_table`, `SELECT FROM public.runs_table`,
		`SELECT FROM public.users_table`, `INSERT INTO public.runs_table (tenant_id) VALUES (NULL)`,
		`UPDATE public.users_table SET is_active = true`,
		`INSERT INTO series_table (series_key) VALUES ('x')`, `UPDATE values_table SET annotation = 'x'`, `DELETE FROM series_table`,
		`SET search_path = public; SELECT correct_values('` + north + `', 'x', '[]')`, `TRUNCATE public.values_table`,
		`DROP VIEW north.current_values`,
		`CREATE TABLE public.x ()`, `CREATE TABLE north.x ()`, `CREATE TEMPORARY TABLE x ()`, `CREATE SCHEMA x`, `CREATE VIEW north.x AS SELECT`,
		`CREATE FUNCTION pg_temp.x() RETURNS int RETURN 1`, `CREATE FUNCTION public.x() RETURNS int RETURN 1`, `CREATE ROLE x`,
		`COPY (SELECT) TO PROGRAM 'true'`, `SELECT pg_read_file('PG_VERSION')`,
		`SET ROLE ` + pq.QuoteIdentifier(mustQuery(t, s.db, `SELECT current_user`)),
	} {
		_, err := reader.Exec(refused)
		if failed, ok := errors.AsType[*pq.Error](err); !ok || failed.Code != "42501" {
			t.Errorf("%s: %v, want it to be denied", refused, err)
		}
	}
	if got := mustQuery(t, reader, `SELECT concat_ws(' ', current_setting('statement_timeout'), current_setting('search_path'), rolconnlimit)
		FROM pg_roles WHERE rolname = user`); got != "30s north 5" {
		t.Errorf("the role's limits are %q", got)
	}
	mustCreateTables(t, s.dsn) // as an upgrade does; and what depends on the tables keeps them
	if _, stderr := mustRun(t, 1, s.dsn, "", "delete", "tables", "-y"); !strings.Contains(stderr, "depend") {
		t.Errorf("delete tables beside the tenant's schema says %q", stderr)
	}
	mustExec(t, s.db, "DROP SCHEMA north CASCADE")
	mustRun(t, 0, s.dsn, "", "delete", "tables", "-y")
}

// ---- Faults

// program is timedb as a process of its own, which can be killed.
type program struct {
	cmd *exec.Cmd
	log *logBuffer
}

// mustProgram starts `timedb api` on a port of 127.0.0.1, and waits until it serves.
func mustProgram(t *testing.T, dsn string, port int) *program {
	t.Helper()
	p := &program{exec.Command(os.Args[0], "api", "--port", strconv.Itoa(port)), &logBuffer{}}
	p.cmd.Env = append(os.Environ(), "TEST_RUNS_THE_PROGRAM=1", "TIMEDB_DSN="+dsn)
	out := &logBuffer{}
	p.cmd.Stdout, p.cmd.Stderr = out, p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	for begin := time.Now(); !servesLine.MatchString(out.String()); time.Sleep(time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatalf("timedb does not serve: %s", p.log)
		}
	}
	return p
}

func (p *program) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// freePort is one that nobody listens on, below those that Linux hands out by itself.
func freePort(t *testing.T) int {
	for range 1000 {
		port := 10_000 + rand.Intn(10_000)
		if l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("there is no free port")
	return 0
}

// cluster is a PostgreSQL of the test's own, which can be killed. Only 127.0.0.1 reaches it, and it asks for no password.
type cluster struct {
	bin, data string
	port      int
	cmd       *exec.Cmd
}

// as has cmd run as a user that PostgreSQL accepts, who is not root.
func (c *cluster) as(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = "/"
	if who, err := osuser.Lookup("postgres"); err == nil && os.Getuid() == 0 {
		uid, _ := strconv.ParseUint(who.Uid, 10, 32)
		gid, _ := strconv.ParseUint(who.Gid, 10, 32)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		os.Chown(filepath.Dir(c.data), int(uid), int(gid))
	}
	return cmd
}

// mustFolder returns a new folder that the cluster's user may enter.
func mustFolder(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("", "timedb-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// mustCluster starts a cluster: an empty one, or a standby of another.
func mustCluster(t *testing.T, primary *cluster) *cluster {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("no PostgreSQL server is installed here whose processes could be killed")
	}
	c := &cluster{bin: filepath.Dir(found[len(found)-1]), data: filepath.Join(mustFolder(t), "data"), port: freePort(t)}
	make := exec.Command(c.bin+"/initdb", "-D", c.data, "-U", "timedb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8")
	if primary != nil {
		make = exec.Command(c.bin+"/pg_basebackup", "-D", c.data, "-R", "-c", "fast", "-d", primary.dsn())
	}
	if out, err := c.as(make).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v %s", make.Args, err, out)
	}
	t.Cleanup(c.kill)
	c.mustStart(t)
	return c
}

func (c *cluster) dsn() string {
	return fmt.Sprintf("postgresql://timedb@127.0.0.1:%d/postgres?sslmode=disable", c.port)
}

// mustStart starts PostgreSQL and waits until it answers. What is left of a killed one may keep it from starting for a moment.
func (c *cluster) mustStart(t *testing.T) {
	t.Helper()
	db := mustOpen(t, c.dsn())
	for begin := time.Now(); time.Since(begin) < time.Minute; {
		var log bytes.Buffer
		c.cmd = c.as(exec.Command(c.bin+"/postgres", "-D", c.data, "-p", strconv.Itoa(c.port), "-c", "listen_addresses=127.0.0.1",
			"-c", "unix_socket_directories=", "-c", "max_connections=100"))
		c.cmd.Stderr = &log
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { c.cmd.Wait(); close(ended) }()
		for waiting := true; waiting; {
			select {
			case <-ended:
				waiting = false
			case <-time.After(5 * time.Millisecond):
				if db.Ping() == nil {
					return
				}
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("PostgreSQL does not start")
}

func (c *cluster) kill() { c.cmd.Process.Kill() }

// proxy stands between timedb and PostgreSQL. It can cut all connections, and freeze them and those to come.
type proxy struct {
	dsn string
	mu  sync.RWMutex // held for writing: frozen
	all sync.Map     // of net.Conn
}

func mustProxy(t *testing.T, dsn string) *proxy {
	t.Helper()
	u := mustParse(t, dsn)
	target := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	u.Host = listener.Addr().String()
	p := &proxy{dsn: u.String()}
	pass := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		for buf := make([]byte, 4096); ; {
			n, err := from.Read(buf)
			p.mu.RLock()
			if err == nil {
				_, err = to.Write(buf[:n])
			}
			p.mu.RUnlock()
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			database, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			p.all.Store(client, nil)
			go pass(client, database)
			go pass(database, client)
		}
	}()
	return p
}

func (p *proxy) cut() {
	p.all.Range(func(conn, _ any) bool {
		p.all.Delete(conn)
		conn.(net.Conn).Close()
		return true
	})
}

func TestFaultClientThatHangsUpIsNoErrorInTheLog(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1")))
	tx, err := s.db.Begin()
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE values_table`)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	ctx, hangUp := context.WithTimeout(context.Background(), time.Second)
	defer hangUp()
	r, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/values", nil)
	r.Header.Set("X-API-Key", key)
	if _, err := s.client.Do(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`level=(\w+) msg=request method=GET path=/values status=503`)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if found := line.FindStringSubmatch(s.log.String()); found != nil && found[1] == "INFO" {
			return
		} else if found != nil || time.Now().After(deadline) {
			t.Fatalf("the log has %q", s.log)
		}
	}
}

func TestFaultHealthAnswersWhileEveryLookupWaits(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	tx, err := s.db.Begin()
	if err == nil {
		_, err = tx.Exec(`LOCK TABLE users_table`)
	}
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer tx.Rollback()
	for range 8 * lookupPool {
		all.Go(func() { s.do("GET", "/values", key, "") })
	}
	for deadline := time.Now().Add(time.Minute); mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`) != fmt.Sprint(lookupPool); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the lookups do not wait")
		}
	}
	s.must(t, 200, "GET", "/healthz", "", "")
}

func TestFaultFrozenDatabaseIsGivenUpWithinItsConnectTimeout(t *testing.T) {
	t.Parallel()
	p := mustProxy(t, mustDatabase(t))
	st, err := openStore(p.dsn+"&connect_timeout=1", "public", statementTimeout, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer st.db.Close()
	p.mu.Lock() // it accepts, and says nothing
	defer p.mu.Unlock()
	failed := make(chan error, 1)
	go func() { failed <- st.db.Ping() }()
	select {
	case err := <-failed:
		if err == nil || !unavailable(err) {
			t.Errorf("Ping: %v", err)
		}
	case <-time.After(30 * time.Second): // and not after statementTimeout
		t.Error("it still waits to be connected")
	}
}

// ledger remembers what servers have acknowledged, to compare it to what is stored.
type ledger struct {
	servers []*testServer
	key     string
	mu      sync.Mutex
	runs    map[string]int // acknowledged runs, and how many rows they have
	notes   map[string]bool
	other   map[string]int // answers that are neither 200 nor 503
	counts  [3]int         // 200, 503, no answer
}

const ledgerRows = 2400 // of a run: three blocks

// mustLedger prepares what the work needs, a series whose values can be corrected. The tables and users are made through dsn.
func mustLedger(t *testing.T, servers ...*testServer) *ledger {
	t.Helper()
	l := &ledger{servers: servers, runs: map[string]int{}, notes: map[string]bool{}, other: map[string]int{}}
	l.key = servers[0].mustUser(t, tenantA, "ledger@example.com")
	servers[0].must(t, 200, "POST", "/upload", l.key, runWith("", at("2025-01-01", "1"), at("2025-01-02", "1"), at("2025-01-03", "1")))
	return l
}

// send notes how one request ends, and returns whether it was acknowledged.
func (l *ledger) send(t *testing.T, s *testServer, method, path, body string, header ...string) bool {
	resp, text, err := s.do(method, path, l.key, body, header...)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.counts[2]++
	case resp.StatusCode == 200:
		l.counts[0]++
		return true
	case resp.StatusCode == 503:
		l.counts[1]++
		if resp.Header.Get("Retry-After") == "" {
			t.Errorf("503 without Retry-After: %s", text)
		}
	default:
		l.other[fmt.Sprint(resp.StatusCode, " ", text)]++
	}
	return false
}

// work uploads, uploads again until it is acknowledged, corrects and reads, until ctx is done.
func (l *ledger) work(ctx context.Context, t *testing.T, clients int) *sync.WaitGroup {
	var all sync.WaitGroup
	for client := range clients {
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				s := l.servers[(client+n)%len(l.servers)]
				run := fmt.Sprintf("%08x-0000-4000-8000-%012x", client, rand.Int63n(1<<47))
				note := "beside " + run
				csv := []byte("valid_time,value_key,value\n")
				for i := range ledgerRows {
					csv = fmt.Appendf(csv, "2025-02-01T%02d:%02d:%02dZ,s%d,%d\n", i/3600, i/60%60, i%60, client%3, n)
				}
				upload := func() bool {
					return l.send(t, s, "POST", "/upload?run_start_time=2025-01-01&run_id="+run, string(csv), "Content-Type: text/csv")
				}
				stored := false
				switch n % 4 {
				case 0:
					stored = upload()
				case 1:
					for end := time.Now().Add(time.Minute); !stored && time.Now().Before(end); { // also after ctx is done
						stored = upload()
						time.Sleep(10 * time.Millisecond)
					}
				case 2:
					update := fmt.Sprintf(`{"updates":[{"valid_time":"2025-01-0%d","series_key":"load","value":%d,"annotation":%q}]}`, 1+n%3, n, note)
					acknowledged := l.send(t, s, "PUT", "/values", update)
					l.mu.Lock()
					l.notes[note] = acknowledged
					l.mu.Unlock()
				case 3:
					l.send(t, s, "GET", "/values?series_key=load", "")
				}
				if stored || n%4 == 1 {
					l.mu.Lock()
					l.runs[run] = ledgerRows
					l.mu.Unlock()
				}
			}
		})
	}
	return &all
}

// check compares what was acknowledged to what is stored: every acknowledged run once and whole, none in part, every
// acknowledged correction once, none twice.
func (l *ledger) check(t *testing.T, db *sql.DB) {
	t.Helper()
	if len(l.other) > 0 {
		t.Errorf("answers that are neither 200 nor 503: %v", l.other)
	}
	rows, err := db.Query(`SELECT r.run_id, r.rows_inserted, coalesce(sum(cardinality(v."values")) FILTER (WHERE v.version = 1), 0)
		FROM runs_table r LEFT JOIN values_table v ON v.tenant_id = r.tenant_id AND v.run_id = r.run_id GROUP BY 1, 2`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var run string
		var said, stored int
		if err := rows.Scan(&run, &said, &stored); err != nil {
			t.Fatal(err)
		}
		if said != stored {
			t.Errorf("run %s has %d of its %d rows", run, stored, said)
		}
		delete(l.runs, run)
	}
	if len(l.runs) > 0 {
		t.Errorf("%d acknowledged runs are lost", len(l.runs))
	}
	var stored map[string]int
	if err := json.Unmarshal([]byte(mustQuery(t, db, `SELECT coalesce(json_object_agg(annotation, n), '{}') FROM (
		SELECT annotation, count(*) AS n FROM values_table WHERE annotation IS NOT NULL GROUP BY 1) AS t`)), &stored); err != nil {
		t.Fatal(err)
	}
	for note, acknowledged := range l.notes {
		if count := stored[note]; acknowledged && count != 1 || count > 1 {
			t.Errorf("a correction, acknowledged: %v, is there %d times", acknowledged, count)
		}
	}
	t.Logf("%d requests were acknowledged, %d got 503, %d no answer", l.counts[0], l.counts[1], l.counts[2])
	if l.counts[0] == 0 {
		t.Error("nothing was acknowledged")
	}
}

// serverAt is a server that listens on a port, whoever it is.
func serverAt(t *testing.T, dsn string, port int) *testServer {
	s := &testServer{url: fmt.Sprintf("http://127.0.0.1:%d", port), dsn: dsn, db: mustOpen(t, dsn), log: &logBuffer{}}
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}, Timeout: time.Minute}
	return s
}

func TestFaultKilledServerLosesNothing(t *testing.T) {
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProgram(t, asAppRole(dsn), port)
	s := serverAt(t, dsn, port)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range 5 * *faults {
		time.Sleep(time.Duration(50+rand.Intn(200)) * time.Millisecond)
		p.kill()
		p = mustProgram(t, asAppRole(dsn), port)
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
}

func TestFaultKilledDatabaseLosesNothing(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	mustRun(t, 0, c.dsn(), "", "create", "tables", "--with-users", "-y")
	port := freePort(t)
	mustProgram(t, c.dsn(), port)
	s := serverAt(t, c.dsn(), port)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range *faults {
		time.Sleep(time.Duration(300+rand.Intn(500)) * time.Millisecond)
		c.kill()
		for range 3 {
			resp, text, err := s.do("GET", "/values?series_key=load", l.key, "")
			if err != nil || resp.StatusCode != 503 && resp.StatusCode != 200 { // 200: the last of PostgreSQL's processes still answered
				t.Errorf("without a database: %v %v %s", err, resp, text)
			}
		}
		c.mustStart(t)
		returned := time.Now()
		for !l.send(t, s, "GET", "/values?series_key=load", "") {
			if time.Since(returned) > 2*time.Second {
				t.Error("no service two seconds after the database's return")
				break
			}
		}
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
	if l.counts[1] == 0 {
		t.Error("there was no 503: was the database killed?")
	}
}

func TestFaultCutConnectionsLoseNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	ctx, stop := context.WithCancel(context.Background())
	clients := l.work(ctx, t, 6)
	for range 15 * *faults {
		time.Sleep(time.Duration(20+rand.Intn(150)) * time.Millisecond)
		p.cut()
	}
	stop()
	clients.Wait()
	l.check(t, s.db)
}

func TestFaultFrozenDatabaseIs503AndThenServesAgain(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	p := mustProxy(t, dsn)
	s := mustAPIOn(t, dsn, p.dsn)
	l := mustLedger(t, s)
	s.client.Timeout = 4 * lookupTimeout
	p.mu.Lock() // nothing is forwarded any more, nor are connections ended
	var all sync.WaitGroup
	for _, path := range []string{"/values", "/healthz", "/runs", "/list_timeseries", "/values?series_key=load"} {
		all.Go(func() {
			if resp, text, err := s.do("GET", path, l.key, ""); err != nil || resp.StatusCode != 503 {
				t.Errorf("GET %s of a frozen database: %v %v %s", path, err, resp, text)
			}
		})
	}
	all.Wait()
	p.mu.Unlock()
	for begin := time.Now(); !l.send(t, s, "GET", "/values?series_key=load", ""); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > time.Minute {
			t.Fatal("no service after the database goes on")
		}
	}
	s.must(t, 200, "GET", "/healthz", "", "")
}

// mustLockValues makes every statement on values_table wait until the function that it returns is called.
func (s *testServer) mustLockValues(t *testing.T) (unlock func()) {
	t.Helper()
	tx, err := s.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	if _, err := tx.Exec("LOCK TABLE values_table"); err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

func TestFaultFullPoolIs503AndKeysAreStillJudged(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	unlock := s.mustLockValues(t)
	var all sync.WaitGroup
	for range poolSize + 20 {
		all.Go(func() { l.send(t, s, "GET", "/values?series_key=load", "") })
	}
	for busy := ""; busy != strconv.Itoa(poolSize); time.Sleep(5 * time.Millisecond) {
		busy = mustQuery(t, s.db, `SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'values_table'::regclass`)
	}
	s.must(t, 200, "GET", "/healthz", "", "")
	s.must(t, 401, "GET", "/values", "", "")
	for l.full() < 20 { // the 20 that got no connection
		time.Sleep(10 * time.Millisecond)
	}
	unlock()
	all.Wait()
	if l.counts != [3]int{poolSize, 20, 0} || len(l.other) > 0 {
		t.Errorf("%v of 200, 503 and none, and %v", l.counts, l.other)
	}
}

// full is how many requests got 503 so far.
func (l *ledger) full() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts[1]
}

func TestFaultStandbyServesReadsAndRefusesWrites(t *testing.T) {
	t.Parallel()
	primary := mustCluster(t, nil)
	mustRun(t, 0, primary.dsn(), "", "create", "tables", "--with-users", "-y")
	l := mustLedger(t, mustAPIOn(t, primary.dsn(), primary.dsn()))
	standby := mustCluster(t, primary)
	s := mustAPIOn(t, standby.dsn(), standby.dsn())
	s.must(t, 200, "GET", "/healthz", "", "")
	if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", l.key, "")); got.Count != 3 {
		t.Errorf("the standby shows %d values, want 3", got.Count)
	}
	for _, request := range [][3]string{{"POST", "/upload", runWith("", at("2025-01-01", "1"))}, {"POST", "/series", `{"name":"new"}`},
		{"PUT", "/values", `{"updates":[{"valid_time":"2025-01-01","series_key":"load","value":2}]}`}} {
		s.must(t, 503, request[0], request[1], l.key, request[2])
	}
}

func TestFaultEndedStatementIs503AndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	l := mustLedger(t, s)
	unlock := s.mustLockValues(t)
	done := make(chan bool)
	go func() { done <- l.send(t, s, "POST", "/upload", runWith("", at("2025-02-01", "1"))) }()
	for ended := ""; ended != "1"; time.Sleep(5 * time.Millisecond) { // as statement_timeout ends it, with SQLSTATE 57014
		ended = mustQuery(t, s.db, `SELECT count(*) FROM (SELECT pg_cancel_backend(pid) FROM pg_locks WHERE NOT granted
			AND relation = 'values_table'::regclass) AS x`)
	}
	if <-done || l.counts[1] != 1 {
		t.Errorf("an upload whose statement was ended: %v %v", l.counts, l.other)
	}
	unlock()
	if got := s.stored(t); !strings.HasPrefix(got, "1 ") {
		t.Errorf("stored %q", got)
	}
}

func TestFaultFullDiskIs503AndStoresNothingInPart(t *testing.T) {
	t.Parallel()
	c := mustCluster(t, nil)
	disk := mustFolder(t)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=24m", "none", disk).CombinedOutput(); err != nil {
		t.Skipf("a small disk cannot be mounted here: %s", out)
	}
	t.Cleanup(func() { exec.Command("umount", "-l", disk).Run() })
	if out, err := exec.Command("chown", "--reference", c.data, disk).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	owner := mustOpen(t, c.dsn())
	mustExec(t, owner, "CREATE TABLESPACE small LOCATION '"+disk+"'")
	mustExec(t, owner, "CREATE DATABASE small TABLESPACE small")
	dsn := strings.Replace(c.dsn(), "/postgres", "/small", 1)
	mustRun(t, 0, dsn, "", "create", "tables", "--with-users", "-y")
	s := mustAPIOn(t, dsn, dsn)
	l := mustLedger(t, s)
	_, csv := uploadBodies(10_000)
	upload := func() bool {
		return l.send(t, s, "POST", "/upload?run_start_time=2025-01-01", csv, "Content-Type: text/csv")
	}
	for n := 0; upload(); n++ {
		if n == 1000 {
			t.Fatal("the disk is never full")
		}
	}
	if l.counts[1] != 1 {
		t.Errorf("on a full disk: %v %v", l.counts, l.other)
	}
	s.must(t, 200, "GET", "/values?series_key=load", l.key, "")
	if out, err := exec.Command("mount", "-o", "remount,size=200m", disk).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if !upload() {
		t.Errorf("after the disk was enlarged: %v", l.other)
	}
	l.check(t, s.db)
}

func TestFaultOverloadIsAnsweredAndPasses(t *testing.T) {
	s := mustServer(t)
	l := mustLedger(t, s)
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000}, Timeout: time.Minute}
	csvBody, _ := uploadBodies(20_000)
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(*faults)*3*time.Second)
	defer stop()
	var all sync.WaitGroup
	for client := range 100 + 45**faults {
		all.Go(func() {
			for n := client; ctx.Err() == nil; n++ {
				switch n % 10 {
				case 0:
					l.send(t, s, "POST", "/upload", csvBody)
				case 1:
					l.send(t, s, "GET", "/values", "")
				default:
					l.send(t, s, "GET", "/values?series_key=load", "")
				}
			}
		})
	}
	probe := &http.Client{Timeout: 30 * time.Second}
	for ctx.Err() == nil {
		for _, path := range []string{"/healthz", "/"} {
			if resp, err := probe.Get(s.url + path); err != nil || resp.StatusCode != 200 {
				t.Errorf("GET %s under load: %v %v", path, resp, err)
			} else {
				resp.Body.Close()
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	all.Wait()
	if len(l.other) > 0 || l.counts[0] == 0 || l.counts[2] > 0 {
		t.Errorf("%v of 200, 503 and no answer; others: %v", l.counts, l.other)
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	t.Logf("%v of 200, 503 and no answer; %d MiB from the system", l.counts, memory.Sys>>20)
	if memory.Sys > 2<<30 { // the clients' is in it
		t.Errorf("%d MiB from the system", memory.Sys>>20)
	}
	s.must(t, 200, "GET", "/values?series_key=load", l.key, "") // at once
}

func TestFaultSoakGrowsNothing(t *testing.T) {
	s := mustServer(t)
	l := mustLedger(t, s)
	state := func() (goroutines int, connections string, heap uint64) {
		s.client.CloseIdleConnections()
		time.Sleep(300 * time.Millisecond)
		runtime.GC()
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		return runtime.NumGoroutine(), mustQuery(t, s.db, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND usename = $1`, appRole.name), memory.HeapAlloc
	}
	for _, part := range []int{1, 9} { // the first fills pools and caches
		ctx, stop := context.WithTimeout(context.Background(), time.Duration(part**faults**faults)*150*time.Millisecond)
		before, connections, heap := state()
		l.work(ctx, t, 8).Wait()
		stop()
		if part > 1 {
			l.check(t, s.db)
			l.runs, l.notes = map[string]int{}, map[string]bool{} // or the ledger is what grows, or the log, which is in this process
			s.log.mu.Lock()
			s.log.buf = bytes.Buffer{}
			s.log.mu.Unlock()
		}
		after, connectionsAfter, heapAfter := state()
		t.Logf("goroutines %d → %d, connections %s → %s, heap %d → %d KiB", before, after, connections, connectionsAfter, heap>>10, heapAfter>>10)
		if many, _ := strconv.Atoi(connectionsAfter); part > 1 && (after > before+10 || many > poolSize+lookupPool+1 || heapAfter > heap+16<<20) {
			t.Error("something grows")
		}
	}
}

func TestFaultSIGTERMUnderLoadLosesNoAcknowledgedWrite(t *testing.T) { // S30
	t.Parallel()
	dsn, port := mustDatabase(t), freePort(t)
	mustCreateTables(t, dsn, "--with-users")
	s := serverAt(t, dsn, port)
	s.client.Transport = &http.Transport{DisableKeepAlives: true} // so that no connection is closed for being idle
	var l *ledger
	for range *faults {
		p := mustProgram(t, asAppRole(dsn), port)
		if l == nil {
			l = mustLedger(t, s)
		}
		ctx, stop := context.WithCancel(context.Background())
		served := l.counts[0]
		clients := l.work(ctx, t, 8)
		time.Sleep(time.Duration(300+rand.Intn(300)) * time.Millisecond)
		stop() // what is on its way then, ends; what is retried, ends with the next server
		begin := time.Now()
		p.cmd.Process.Signal(syscall.SIGTERM)
		if err := p.cmd.Wait(); err != nil || time.Since(begin) > drainTimeout+5*time.Second {
			t.Errorf("after SIGTERM: %v, in %s", err, time.Since(begin))
		}
		next := mustProgram(t, asAppRole(dsn), port)
		clients.Wait()
		logged := strings.Count(p.log.String(), "status=200") + strings.Count(next.log.String(), "status=200")
		if served == 0 {
			logged-- // the upload of the ledger itself
		}
		if answered := l.counts[0] - served; answered != logged {
			t.Errorf("%d requests were served, and %d answers arrived", logged, answered)
		}
		next.kill()
	}
	l.check(t, s.db)
}

func TestFaultTwoServersActAsOne(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	servers := []*testServer{mustAPI(t, dsn), mustAPI(t, dsn)}
	l := mustLedger(t, servers...)
	for n := range 10 * *faults {
		var all sync.WaitGroup
		run := fmt.Sprintf(`"run_id":"00000000-0000-4000-8000-%012x",`, n)
		answers := make([]string, 8)
		for i := range answers { // the same request at once, of a series that is new
			all.Go(func() {
				answers[i] = servers[i%2].must(t, 200, "POST", "/upload", l.key, strings.Replace(runWith(run, at("2025-01-01", "1")), `"load"`, fmt.Sprintf(`"new %d"`, n), 1))
			})
		}
		all.Wait()
		if slices.Sort(answers); answers[0] != answers[7] {
			t.Errorf("%s and %s", answers[0], answers[7])
		}
	}
	ctx, stop := context.WithTimeout(context.Background(), time.Duration(*faults)*time.Second)
	defer stop()
	l.work(ctx, t, 8).Wait()
	l.check(t, servers[0].db)
	if got := mustQuery(t, servers[0].db, `SELECT count(*) FROM (SELECT FROM values_table WHERE version > 1 GROUP BY series_id, run_id,
		valid_from, version HAVING count(*) > 1) AS twice`); got != "0" {
		t.Errorf("%s versions were given twice", got)
	}
}

func TestDumpAndRestoreAnswersTheSame(t *testing.T) {
	t.Parallel()
	dsn, copied := mustDatabase(t), mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	l := mustLedger(t, mustAPI(t, dsn))
	ctx, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	l.work(ctx, t, 4).Wait()
	if out, err := exec.Command("bash", "-c", `pg_dump "$0" | psql -qX -v ON_ERROR_STOP=1 "$1"`, dsn, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	restored := mustAPI(t, copied)
	for _, path := range []string{"/values", "/values?mode=overlapping&all_versions=true", "/runs", "/list_timeseries",
		"/values?format=csv&as_of=" + time.Now().UTC().Format("2006-01-02T15:04:05.000Z")} {
		if before, after := l.servers[0].must(t, 200, "GET", path, l.key, ""), restored.must(t, 200, "GET", path, l.key, ""); before != after {
			t.Errorf("GET %s differs after a restore", path)
		}
	}
	restored.must(t, 200, "POST", "/upload", l.key, runWith("", at("2025-03-01", "1")))
}

func TestStoppingServerFinishesWhatItBegan(t *testing.T) { // S30
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 4
	var began, ended sync.WaitGroup
	stopped := make(chan struct{})
	began.Add(n)
	for i := range n {
		ended.Go(func() {
			in, out := io.Pipe()
			go func() {
				// The client sends the body only after the server asked for it: then the handler is reading.
				io.WriteString(out, `{"run_start_time":"2025-01-01",`)
				began.Done()
				<-stopped
				io.WriteString(out, `"value_rows":[`+strings.Replace(at("2025-01-01", "1"), "load", "s"+strconv.Itoa(i), 1)+`]}`)
				out.Close()
			}()
			r, _ := http.NewRequest("POST", s.url+"/upload", in)
			r.Header = http.Header{"X-Api-Key": {key}, "Content-Type": {"application/json"}, "Expect": {"100-continue"}}
			resp, err := s.client.Do(r)
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("a request that had begun: %v %v", resp, err)
				return
			}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		})
	}
	began.Wait()
	code := make(chan int)
	go func() { code <- s.stop() }()
	for { // once nobody is let in any more, the server is stopping
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			break
		}
		conn.Close()
		time.Sleep(time.Millisecond)
	}
	close(stopped)
	ended.Wait()
	if got := <-code; got != 0 {
		t.Errorf("exit %d after a stop, want 0", got)
	}
	if got := s.stored(t); got != "4 4 4 4" {
		t.Errorf("stored %q, want every acknowledged upload", got)
	}
}

func TestAbandonedAndTruncatedUploadsStoreNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith("", at("2025-01-01", "1"))
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", key, len(body)+10, body)
	conn.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
	if got := s.stored(t); got != "0 0 0" {
		t.Errorf("a body that ended too early stored %q", got)
	}
}

// ---- Benchmarks

// uploadBodies are rows as the notebooks' pandas writes them: ten series, one after the other, in quarters of an hour.
func uploadBodies(rows int) (asJSON, asCSV string) {
	var list []string
	csv := []byte("valid_time,value_key,value\n")
	for i := range rows {
		at := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(i%(rows/10)) * 15 * time.Minute)
		key, value := fmt.Sprintf("series_%d", i/(rows/10)), 80+float64(i*7919%40_000)/1000
		list = append(list, fmt.Sprintf(`{"valid_time":%q,"value_key":%q,"value":%g}`, at.Format("2006-01-02T15:04:05+00:00"), key, value))
		csv = fmt.Appendf(csv, "%s,%s,%g\n", at.Format("2006-01-02 15:04:05+00:00"), key, value)
	}
	return runWith("", list...), string(csv)
}

func benchmarkUpload(b *testing.B, rows int, path, body string, header ...string) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		s.must(b, 200, "POST", path, key, body, header...)
	}
	b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "values/s")
}

func BenchmarkUploadJSON(b *testing.B) {
	body, _ := uploadBodies(100_000)
	benchmarkUpload(b, 100_000, "/upload", body)
}

func BenchmarkUploadCSV(b *testing.B) {
	_, body := uploadBodies(100_000)
	benchmarkUpload(b, 100_000, "/upload?run_start_time=2025-01-01", body, "Content-Type: text/csv")
}

// BenchmarkUploadSensors uploads one value of each of a thousand series.
func BenchmarkUploadSensors(b *testing.B) {
	body := []byte("valid_time,value_key,value\n")
	for i := range 1000 {
		body = fmt.Appendf(body, "2025-01-01 00:00:00+00:00,sensor_%d,%d.5\n", i, i)
	}
	benchmarkUpload(b, 1000, "/upload?run_start_time=2025-01-01", string(body), "Content-Type: text/csv")
}

func BenchmarkReadFlat1M(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	const n = 1_000_000
	mustManyValues(b, s, key, n)
	benchmarkRead(b, s, key, n)
}

// BenchmarkReadRevisions reads the latest of hourly forecasts, each of a week ahead in quarters of an hour.
func BenchmarkReadRevisions(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	const series, runs, values = 20, 168, 672
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for run := range runs {
		known := begin.Add(time.Duration(run) * time.Hour)
		text := fmt.Appendf(nil, `{"run_start_time":%[1]q,"known_time":%[1]q,"value_rows":[`, known.Format(time.RFC3339))
		for i := range series * values {
			text = fmt.Appendf(text, `{"value_key":"load%d","valid_time":%q,"value":%d.5},`, i/values,
				known.Add(time.Duration(i%values)*15*time.Minute).Format(time.RFC3339), run)
		}
		s.must(b, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
	benchmarkRead(b, s, key, series*runs*values)
}

// benchmarkRead reads all that there is, which considers n stored values.
func benchmarkRead(b *testing.B, s *testServer, key string, n int) {
	b.ReportAllocs()
	for b.Loop() {
		r, _ := http.NewRequest("GET", s.url+"/values", nil)
		r.Header.Set("X-API-Key", key)
		r.Header.Set("Accept-Encoding", "identity")
		resp, err := s.client.Do(r)
		if err != nil || resp.StatusCode != 200 {
			b.Fatal(resp, err)
		}
		size, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(size)
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "values/s")
}

func BenchmarkSmallRead(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	mustManyValues(b, s, key, 100_000)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, _, err := s.do("GET", "/values?series_key=load&start_valid=2020-02-01T00:00:00Z&end_valid=2020-02-01T01:00:00Z", key, "")
			if err != nil || resp.StatusCode != 200 {
				b.Error(resp, err)
			}
		}
	})
}

// ---- Fuzz targets

func FuzzParseTime(f *testing.F) {
	for _, seed := range []string{"2025-01-01T00:00:00Z", "2025-01-01", "2025-01-01 05:30 05:30",
		"1677-01-01T00:00:00.000001-23:59", "2262-12-31T23:59:59.999999999Z", "2025-02-29T00:00:00Z", "2025-01-01T24:00:00Z"} {
		f.Add(seed)
	}
	strict := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$`) // time.Parse takes more than RFC 3339
	f.Fuzz(func(t *testing.T, s string) {
		var got, again micros
		err := got.UnmarshalText([]byte(s))
		want, wantErr := time.Parse(time.RFC3339Nano, s)
		if year := want.UTC().Year(); strict.MatchString(s) && (err == nil) != (wantErr == nil && year >= 1677 && year <= 2262) {
			t.Fatalf("parseTime(%q): %v, time.Parse: %v", s, err, wantErr)
		}
		if err != nil {
			return
		}
		text := got.String()
		if strict.MatchString(s) && text != iso6(want) {
			t.Errorf("parseTime(%q) is %s, want %s", s, text, iso6(want))
		}
		if err := again.UnmarshalText([]byte(text)); err != nil || again != got {
			t.Errorf("parseTime(%q) is written as %s, which reads as %v, %v", s, text, again, err)
		}
	})
}

// iso6 is t as the API writes it.
func iso6(t time.Time) string {
	if t = t.UTC().Truncate(time.Microsecond); t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05-07:00")
	}
	return t.Format("2006-01-02T15:04:05.000000-07:00")
}

func FuzzSpan(f *testing.F) {
	for _, seed := range []string{"PT36H", "P1D", "P1W2DT3H4M5.5S", "90m", "1h30m", "P", "PT", "P1M", "-1h", "0s", "P99999W",
		"PT9999999999999999H", "1ns", "PT2562047H47M16.854775807SP100000D"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got span
		err := got.UnmarshalText([]byte(s))
		if err == nil && (got < 0 || micros(got) < 0) {
			t.Errorf("%q is read as %d", s, got)
		}
		if d, goErr := time.ParseDuration(s); goErr == nil && err == nil && int64(micros(got)) != d.Microseconds() {
			t.Errorf("%q is read as %d µs, want %v", s, micros(got), d)
		}
	})
}

func FuzzNumber(f *testing.F) {
	for _, seed := range []string{"1", "-0", "1e308", "1e309", "NaN", "", "Infinity", "0x1p-2", "1_0", "5e-324", "+1", "nan", "null"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got number
		if got.UnmarshalText([]byte(s)) != nil {
			return
		}
		want, wantErr := strconv.ParseFloat(s, 64)
		if math.IsInf(float64(got), 0) || !math.IsNaN(float64(got)) && (wantErr != nil || float64(got) != want) {
			t.Errorf("%q is read as %v, want %v %v", s, got, want, wantErr)
		}
	})
}

func FuzzUploadCSV(f *testing.F) {
	for _, seed := range []string{"valid_time,value_key,value\n2025-01-01,load,1\n2025-01-02,load,\n", "value,series_id,valid_time\n",
		"valid_time,value_key,value,valid_time_end\r\n\"2025-01-01 00:00\",\"a\"\"b\",NaN,2025-01-02\r\n", "valid_time,value\n1\n", "\"", ""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		u := &upload{points: map[seriesRef][]point{}}
		err := u.decodeCSV(bytes.NewReader(body))
		if err == nil {
			if all, err := csv.NewReader(bytes.NewReader(body)).ReadAll(); err != nil || len(all) != u.rows+1 {
				t.Fatalf("%d rows of %q, encoding/csv finds %d lines: %v", u.rows, body, len(all), err)
			}
		} else if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 422 {
			t.Errorf("%q: %v, want a refusal with 422", body, err)
		}
	})
}

func FuzzUpdates(f *testing.F) {
	for _, seed := range []string{`{"valid_time":"2025-01-01","series_key":"a","value":1}`, `{"valid_time":"2025-01-01","series_id":null,"tags":["B","a "]}`,
		`{"value":null,"value":1}`, `{"valid_time":"2025-01-01T00:00Z","valid_time_end":null,"series_key":"x","annotation":" y "}`, `{"Value":1}`, `[]`, `{`} {
		f.Add([]byte(`{"updates":[` + seed + `]}`))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var updates []map[string]any
		err := fields{"updates": list(func(decode func(into any) error) error {
			var text rawJSON
			if err := decode(&text); err != nil {
				return err
			}
			ref, update, err := decodeUpdate(Caller{tenant: tenantA}, text)
			if err == nil && (ref == seriesRef{} || update["valid_time"] == nil || len(update) < 3) {
				t.Errorf("%q is read as %v %v", body, ref, update)
			}
			updates = append(updates, update)
			return err
		})}.decodeJSON(bytes.NewReader(body))
		if err == nil {
			asJSON(updates) // must not panic
		} else if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 422 && refused.status != 403 {
			t.Errorf("%q: %v, want a refusal", body, err)
		}
	})
}

func FuzzDecodeArray(f *testing.F) {
	const oid, null = 701, uint64(0x7ff8000000000001)
	f.Add(encodeArray(oid, []uint64{1, null, math.MaxUint64}, null))
	f.Add(encodeArray(oid, nil, null))
	f.Add([]byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 189, 255, 255, 255, 255, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, wire []byte) {
		_, _ = decodeArray(nil, wire, null) // it must not panic, whatever the database sends
		bits := make([]uint64, len(wire)/8)
		for i := range bits {
			bits[i] = binary.BigEndian.Uint64(wire[8*i:])
		}
		if len(bits) == 0 {
			return // no row holds an empty array
		}
		got, err := decodeArray([]uint64{42}, encodeArray(oid, bits, null), null)
		if err != nil || !slices.Equal(got, append([]uint64{42}, bits...)) {
			t.Errorf("%x comes back as %x, %v", bits, got, err)
		}
	})
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

// decodeUpload decodes the body of an upload as POST /upload does, without a database.
func decodeUpload(body []byte) (*upload, error) {
	u := &upload{points: map[seriesRef][]point{}}
	err := fields{"run_id": &u.runID, "run_start_time": &u.start, "known_time": &u.known, "run_params": &u.params,
		"series_descriptions": &u.descriptions, "value_rows": list(u.add)}.decodeJSON(bytes.NewReader(body))
	return u, err
}

func FuzzUploadJSON(f *testing.F) {
	params := runWith(`"run_params":{"a":[{}]},`, at("2025-01-01", "null"))
	for _, seed := range []string{emptyRun, oneValue, params, `{"value_rows":[{},]}`, `{} {`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		u, err := decodeUpload(body)
		if err == nil {
			var plain struct {
				Rows []json.RawMessage `json:"value_rows"`
			}
			if err := json.Unmarshal(body, &plain); err != nil || len(plain.Rows) != u.rows {
				t.Fatalf("%d rows of %q, encoding/json finds %d: %v", u.rows, body, len(plain.Rows), err)
			}
			err = u.check()
		}
		var refused *apiError
		if err != nil && (!errors.As(err, &refused) || refused.status != 422) {
			t.Errorf("%q: %v, want a refusal with 422", body, err)
		}
	})
}
