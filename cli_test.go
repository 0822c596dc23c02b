package main

// These tests cover the command line: where the database comes from, usage and help, creating and
// deleting tables, users and their keys, questions, and how `timedb api` starts. They call run, as
// main does. Only TestUnverifiedConnectionsToTheDatabaseAreKnown and TestManualFitsTheCommands look
// at internals.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
)

// unreachable is the DSN of a database that is down: nobody listens on port 1.
const unreachable = "postgresql://u:hunter2@127.0.0.1:1/db"

// expectWords reports each of the words that text lacks.
func expectWords(t testing.TB, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("no %q in %q", word, text)
		}
	}
}

// expectNoPassword reports the password of these tests' DSNs if it was printed.
func expectNoPassword(t testing.TB, printed string) {
	t.Helper()
	if strings.Contains(printed, "hunter2") {
		t.Errorf("the password was printed: %q", printed)
	}
}

// mustNotServe starts `timedb api`, which must end by itself with the exit code want, and returns what it
// wrote to stderr. A server that does start is stopped after a while; its exit code is 0.
func mustNotServe(t testing.TB, want int, dsn string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	env := func(name string) string {
		if name == "TIMEDB_DSN" {
			return dsn
		}
		return ""
	}
	var out, errs logBuffer
	code := run(ctx, append([]string{"api", "--port", "0"}, args...), env, strings.NewReader(""), &out, &errs)
	if code != want || !strings.Contains(errs.String(), "ERROR: ") {
		t.Fatalf("timedb api %s: exit %d, want %d and an error: %s", strings.Join(args, " "), code, want, &errs)
	}
	return errs.String()
}

// ---- The DSN

func TestDSNComesFromFlagThenTimedbDSNThenDatabaseURL(t *testing.T) { // S29
	t.Parallel()
	good := mustDatabase(t)
	const bad = unreachable
	for _, c := range []struct {
		name                   string
		flag, timedb, database string
		code                   int
	}{
		{"the flag comes before both variables", good, bad, bad, 0},
		{"TIMEDB_DSN comes before DATABASE_URL", "", good, bad, 0},
		{"DATABASE_URL comes last", "", "", good, 0},
		{"a bad flag is not replaced by a variable", bad, good, good, 1},
		{"a bad TIMEDB_DSN is not replaced by DATABASE_URL", "", bad, good, 1},
		{"a bad DATABASE_URL", "", "", bad, 1},
		{"nothing is set", "", "", "", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := []string{"create", "tables", "-y"}
			if c.flag != "" {
				args = append(args, "--dsn", c.flag)
			}
			env := map[string]string{"TIMEDB_DSN": c.timedb, "DATABASE_URL": c.database}
			code, stdout, stderr := runIn(env, "", args...)
			if code != c.code {
				t.Errorf("exit %d, want %d: %s", code, c.code, stderr)
			}
			expectNoPassword(t, stdout+stderr)
			if c.code == 2 {
				expectWords(t, stderr, "ERROR:", "--dsn", "TIMEDB_DSN", "DATABASE_URL")
			}
		})
	}
}

// The secret is hunter2, alone or within a longer password. A reserved character in a password shifts
// what a URL parser takes for the host, the port and the database, and error texts often repeat those.
func TestPasswordOfADSNIsNeverPrinted(t *testing.T) { // S6
	t.Parallel()
	for _, c := range []struct{ name, dsn string }{
		{"a database that is down", unreachable},
		{"an @ behind the secret", "postgresql://u:hunter2@x@127.0.0.1:1/db"},
		{"an @ before the secret", "postgresql://u:x@hunter2@127.0.0.1:1/db"},
		{"a slash behind the secret", "postgresql://u:hunter2/x@127.0.0.1:1/db"},
		{"a slash before the secret", "postgresql://u:x/hunter2@127.0.0.1:1/db"},
		{"a question mark behind the secret", "postgresql://u:hunter2?x@127.0.0.1:1/db"},
		{"a question mark before the secret", "postgresql://u:x?hunter2@127.0.0.1:1/db"},
		{"a hash behind the secret", "postgresql://u:hunter2#x@127.0.0.1:1/db"},
		{"a hash before the secret", "postgresql://u:x#hunter2@127.0.0.1:1/db"},
		{"a password like a port and a path", "postgresql://localhost:1/hunter2@127.0.0.1:1/db"},
		{"a password like a port and a query", "postgresql://localhost:1?hunter2@127.0.0.1:1/db"},
		{"a password like a port and a fragment", "postgresql://localhost:1#hunter2@127.0.0.1:1/db"},
		{"a broken percent escape", "postgresql://u:%zzhunter2@127.0.0.1:1/db"},
		{"a port that is a word", "postgresql://u:hunter2@127.0.0.1:port/db"},
		{"an unknown sslmode", "postgresql://u:hunter2@127.0.0.1:1/db?sslmode=perhaps"},
		{"a timeout that is a word", "postgresql://u:hunter2@127.0.0.1:1/db?connect_timeout=soon"},
		{"an unclosed IPv6 address", "postgresql://u:hunter2@[::1/db"},
		{"a space in the password", "postgresql://u:hunter2 x@127.0.0.1:1/db"},
		{"a line break in the password", "postgresql://u:hunter2\n@127.0.0.1:1/db"},
		{"the password alone", "hunter2"},
		{"key=value with an unclosed quote", "host=127.0.0.1 port=1 password='hunter2"},
		{"key=value with a port that is a word", "host=127.0.0.1 port=x password=hunter2"},
		{"key=value with a key alone", "password = hunter2 port"},
		{"key=value with a value alone", "host=127.0.0.1 port=1 password=x hunter2"},
		{"key=value with all in the host", "host=u:hunter2@127.0.0.1 port=1"},
		{"a password in the query", "postgresql://u:x@127.0.0.1:1/db?password=hunter2&port=x"},
		{"the scheme of another database", "mysql://u:hunter2@127.0.0.1:1/db"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, args := range [][]string{{"users", "list"}, {"api", "--port", "0"}} {
				code, stdout, stderr := runIn(map[string]string{"DATABASE_URL": c.dsn}, "", args...)
				if code == 0 {
					t.Errorf("%v works with the DSN %q", args, c.dsn)
				}
				expectNoPassword(t, stdout+stderr)
			}
		})
	}
}

// A password that begins like a port and a path leads to a server that is up, which would name the rest
// of it as a database that does not exist. PGUSER and PGPASSWORD let it get that far.
func TestPasswordTakenForADatabaseIsNotPrinted(t *testing.T) { // S6
	u := mustParse(t, mustDatabase(t))
	password, _ := u.User.Password()
	t.Setenv("PGUSER", u.User.Username())
	t.Setenv("PGPASSWORD", password)
	for _, c := range []struct{ name, rest string }{
		{"an @ in the database", "/hunter2@127.0.0.1:1"},
		{"a slash in the database", "/hunter2/db"},
		{"an escaped question mark in the database", "/hunter2%3Fdb"},
		{"an escaped hash in the database", "/hunter2%23db"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, stderr := mustRun(t, 1, "postgresql://"+u.Host+c.rest, "", "users", "list")
			expectNoPassword(t, stderr)
		})
	}
}

func TestMisplacedDSNIsNotRepeated(t *testing.T) { // S6
	t.Parallel()
	const dsn = unreachable
	for _, c := range []struct {
		name string
		args []string
	}{
		{"before the command", []string{"-d", dsn, "api"}},
		{"without a flag", []string{"create", "tables", dsn}},
		{"in one word with its flag", []string{"create", "tables", "-d" + dsn}},
		{"in place of a command", []string{dsn}},
		{"as the value of another flag",
			[]string{"api", "--port", "postgresql://127.0.0.1:1/db?password=hunter2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, stdout, stderr := runIn(nil, "", c.args...)
			if code != 2 || stderr == "" {
				t.Errorf("exit %d, want 2 and an error: %q", code, stderr)
			}
			expectNoPassword(t, stdout+stderr)
		})
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
	if password != "" { // without one, the tests' database lets everybody in
		mustRun(t, 1, u.String(), "", "create", "tables", "-y")
	}
	help, _ := mustRun(t, 0, "", "", "help")
	expectWords(t, help, " ps", "TIMEDB_DSN", "PGPASSFILE")
}

func TestNotebookDSNShapesAreUnderstood(t *testing.T) {
	t.Parallel()
	bare, _, _ := strings.Cut(mustDatabase(t), "?")
	for _, c := range []struct{ name, dsn string }{
		{"no parameters", bare},
		{"sslmode and application_name", bare + "?sslmode=prefer&application_name=notebook"},
		{"the scheme postgres", strings.Replace(bare, "postgresql:", "postgres:", 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 0, c.dsn, "", "create", "tables", "-y")
		})
	}
}

// Most of these addresses have no server, so the test reads the judgement off the store.
func TestUnverifiedConnectionsToTheDatabaseAreKnown(t *testing.T) { // S28
	t.Parallel()
	for _, c := range []struct {
		name, dsn string
		exposed   bool
	}{
		{"loopback", "postgresql://u@127.0.0.1/d", false},
		{"localhost without TLS", "postgresql://u@localhost/d?sslmode=disable", false},
		{"loopback by IPv6", "postgresql://u@[::1]/d", false},
		{"a Unix socket", "host=/run/postgresql user=u", false},
		{"another host, verified", "postgresql://u@db.example/d?sslmode=verify-full", false},
		{"another host by default", "postgresql://u@db.example/d", true},
		{"another host, TLS without verification", "postgresql://u@db.example/d?sslmode=require", true},
		{"another host without TLS", "postgresql://u@192.0.2.1/d?sslmode=disable", true},
		{"a name that begins like loopback", "postgresql://u@127.0.0.1.example/d", true},
		{"another host whose name is not verified", "host=db.example user=u sslmode=verify-ca", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, err := openStore(c.dsn, "public", 0, 1, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			defer st.db.Close()
			if st.exposed != c.exposed {
				t.Errorf("%s: exposed is %v, want %v", c.dsn, st.exposed, c.exposed)
			}
		})
	}
}

// ---- Usage and help

func TestWrongUsageIsNamed(t *testing.T) {
	t.Parallel()
	const create = "users create -d " + unreachable
	for _, c := range []struct{ name, line, want string }{
		{"an email that is a word", create + " -t " + tenantA + " -e nonsense", "--email: expected"},
		{"no email", create + " -t " + tenantA, "--email is required"},
		{"a tenant that is a word", create + " -t x -e a@example.com", "--tenant-id: expected"},
		{"an unknown flag", "users list --nope", "-nope"},
		{"one argument too many", "users list nope", `"nope"`},
		{"an unknown command", "nope", "unknown command"},
		{"no database", "users list", "DATABASE_URL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, stderr := runIn(nil, "", strings.Fields(c.line)...)
			if code != 2 {
				t.Errorf("exit %d, want 2", code)
			}
			expectWords(t, stderr, c.want)
		})
	}
}

// The database is down, which alone would give exit code 1. Wrong usage is found before that.
func TestExitCodeOfWrongUsageIsTwo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, line string }{
		{"an unknown command", "nonsense"},
		{"create alone", "create"},
		{"users alone", "users"},
		{"a command's words in the wrong order", "tables create"},
		{"an unknown command on users", "users nonsense"},
		{"help on an unknown command", "help nonsense"},
		{"version with an argument", "version stray"},
		{"version with a flag", "version --nope"},
		{"create tables with an unknown flag", "create tables --nope"},
		{"create tables with an argument", "create tables stray"},
		{"a flag without its value", "create tables --app-role"},
		{"another command's flag", "delete tables --with-users"},
		{"users list with an argument", "users list stray"},
		{"users create without flags", "users create"},
		{"users create without a tenant", "users create -e a@example.com"},
		{"users create without an email", "users create -t " + tenantA},
		{"users create with a tenant that is a word", "users create -t nope -e a@example.com"},
		{"users create with a tenant too long", "users create -t " + tenantA + "0 -e a@example.com"},
		{"users create with an empty email", "users create -e= -t " + tenantA},
		{"users create with an empty tenant", "users create -t= -e a@example.com"},
		{"users create with an email that is a word", "users create -e nonsense -t " + tenantA},
		{"users list with a tenant that is a word", "users list -t nope"},
		{"users deactivate without an email", "users deactivate"},
		{"users deactivate with an empty email", "users deactivate -e="},
		{"users activate without an email", "users activate"},
		{"users activate with a tenant that is a word", "users activate -e a@example.com -t nope"},
		{"users regenerate-key without an email", "users regenerate-key"},
		{"api with a port that is a word", "api --port x"},
		{"api with an argument", "api stray"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, unreachable, "", strings.Fields(c.line)...)
		})
	}
	for _, c := range []struct{ name, email string }{
		{"an email of a space", " "},
		{"an email without a domain", "a@"},
		{"an email without a user", "@example.com"},
		{"an email of an @ alone", "@"},
		{"an email with a line break", "a\nb@example.com"},
		{"an email with a terminal's escape sequence", "a@example.com\x1b[2J"},
		{"an email that is not UTF-8", "a@exa\xffmple.com"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustRun(t, 2, unreachable, "", "users", "create", "-t", tenantA, "-e", c.email)
		})
	}
}

func TestHelpAndVersionNeedNoDatabase(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, flags string }{
		{"create tables", "-dsn -with-users -schema -app-role -dry-run -yes"},
		{"delete tables", "-dsn -schema -yes"},
		{"users create", "-dsn -tenant-id -email -q"},
		{"users list", "-dsn -tenant-id -include-inactive -json"},
		{"users deactivate", "-dsn -email -tenant-id -yes"},
		{"users activate", "-dsn -email -tenant-id"},
		{"users regenerate-key", "-dsn -email -tenant-id -q -yes"},
		{"api", "-dsn -schema -host -port -require-auth -allow-anonymous"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, line := range []string{"help " + c.name, c.name + " -h", c.name + " --help"} {
				stdout, _ := mustRun(t, 0, "", "", strings.Fields(line)...)
				expectWords(t, stdout, strings.Fields(c.flags)...)
			}
		})
	}
	for _, line := range []string{"help", "-h", "--help"} {
		t.Run("the overview by "+line, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, "", "", line)
			expectWords(t, stdout, "users regenerate-key")
		})
	}
	t.Run("version", func(t *testing.T) {
		stdout, _ := mustRun(t, 0, "", "", "version")
		if !strings.HasPrefix(stdout, "timedb ") {
			t.Errorf("timedb version prints %q", stdout)
		}
	})
}

// The manual has a section on each command and on nothing else. A section lists exactly the flags that
// the command takes, and its example is right usage.
func TestManualFitsTheCommands(t *testing.T) {
	t.Parallel()
	sections := map[string]string{}
	for _, section := range strings.Split(usage, "\n== ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		sections[name] = text
		if !slices.ContainsFunc(commands(), func(cmd command) bool { return cmd.name == name }) {
			t.Errorf("the manual has a section on %q, which is no command", name)
		}
	}
	for _, cmd := range commands() {
		t.Run(cmd.name, func(t *testing.T) {
			text, found := sections[cmd.name]
			if !found {
				t.Fatal("the manual has no section on it")
			}
			expectWords(t, usage, "\n  timedb "+cmd.name+" ") // in the overview
			c := &cli{env: func(string) string { return "" }, stdout: io.Discard, stderr: io.Discard}
			if err := cmd.run(c, t.Context(), []string{"-h"}); !errors.Is(err, flag.ErrHelp) {
				t.Fatalf("-h is %v", err)
			}
			var taken []string
			c.flags.VisitAll(func(f *flag.Flag) { taken = append(taken, f.Name) })
			if told := flagsInSection(text); !slices.Equal(told, taken) {
				t.Errorf("it takes %q, the manual tells of %q", taken, told)
			}
			_, example, found := strings.Cut(text, "\nexample: timedb ")
			if !found {
				if cmd.name != "version" {
					t.Error("the manual gives no example")
				}
				return
			}
			example, _, _ = strings.Cut(example, "\n")
			// Without a DSN that is all that is wrong.
			code, _, stderr := runIn(nil, "", strings.Fields(example)...)
			if code != 2 || !strings.Contains(stderr, "no database") {
				t.Errorf("the manual's example %q is wrong usage: %s", example, stderr)
			}
		})
	}
}

// flagsInSection returns the flags that a section of the manual lists, sorted and without dashes.
func flagsInSection(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(strings.TrimSpace(line), "-") {
			continue
		}
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "-") {
				names = append(names, strings.Trim(word, "-,"))
			}
		}
	}
	slices.Sort(names)
	return names
}

// ---- Creating and deleting tables

// createTablesTogether runs create tables four times at once; each must succeed.
func createTablesTogether(t testing.TB, dsn string, more ...string) (warnings string) {
	t.Helper()
	args := append([]string{"create", "tables", "-y"}, more...)
	var all logBuffer
	together(4, func(int) {
		code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", args...)
		if code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
		io.WriteString(&all, stderr)
	})
	return all.String()
}

func TestCreateTablesMayBeRepeatedAndRunConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	createTablesTogether(t, dsn, "--with-users", "--app-role", appRole.name)
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
	mustRun(t, 0, dsn, "", "delete", "tables", "-y") // with nothing left to delete
}

func TestNewSchemaMayBeCreatedConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	createTablesTogether(t, dsn, "-s", "new one")
	if relations(t, db, "new one") == "" {
		t.Error("nothing was created")
	}
	// The search path then holds pg_temp alone, but the tables must not become temporary ones:
	// the schema is made again.
	mustExec(t, db, `DROP SCHEMA public`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	if relations(t, db, "public") == "" {
		t.Error("nothing was created in public")
	}
}

func TestTablesOfAnEarlierVersionAreUpgradedInPlace(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, runWith(`"run_params":{"model":"a"},`, at("2025-01-01", "1")))
	s.must(t, 200, "POST", "/upload", key, runWith(`"run_id":"`+nobody+`","run_params":{"n":1e99999},`))
	before := s.must(t, 200, "GET", "/values?detail=true", key, "")
	s.stop()
	// Version 2 had run_params as jsonb, and a function.
	mustExec(t, s.db, `ALTER TABLE runs_table DROP CONSTRAINT runs_table_run_params_check;
		ALTER TABLE runs_table ALTER run_params TYPE jsonb USING run_params::text::jsonb;
		ALTER TABLE runs_table ADD CHECK (jsonb_typeof(run_params) = 'object');
		CREATE FUNCTION correct_values(uuid, text, jsonb) RETURNS json RETURN NULL::json`)
	// Version 1 had no comment, another compression, and users without a grace.
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS NULL;
		ALTER TABLE values_table ALTER "values" SET COMPRESSION pglz;
		ALTER TABLE users_table DROP previous_digest, DROP previous_ends_at`)
	expectWords(t, mustNotServe(t, 1, s.dsn), "version 1", "run timedb create tables")
	warnings := createTablesTogether(t, s.dsn)
	if strings.Count(warnings, "run_params of run "+nobody) != 1 {
		t.Errorf("of run_params that became too long it is said: %s", warnings)
	}
	mustCreateTables(t, s.dsn)
	after := mustAPI(t, s.dsn).must(t, 200, "GET", "/values?detail=true", key, "")
	if after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	params := mustQuery(t, s.db, `SELECT string_agg(run_params::text, ' ') FROM runs_table`)
	if params != `{"model": "a"}` {
		t.Errorf("after the upgrade run_params are %s", params)
	}
	if left := relations(t, s.db, "public"); strings.Contains(left, "correct_values") {
		t.Errorf("the upgrade leaves %s", left)
	}
	got := mustQuery(t, s.db, `SELECT attcompression FROM pg_attribute
		WHERE attrelid = 'values_table'::regclass AND attname = 'values'`)
	if got != "l" {
		t.Errorf("the compression is %q, want l of lz4", got)
	}
}

func TestTablesOfALaterVersionAreLeftAlone(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustExec(t, db, `COMMENT ON TABLE runs_table IS 'timedb schema 99'`)
	expectWords(t, mustNotServe(t, 1, dsn), "version 99", "the timedb that made them")
	_, stderr := mustRun(t, 1, dsn, "", "create", "tables", "-y")
	expectWords(t, stderr, "version 99", "the timedb that made them")
}

func TestCitusIsAskedForByName(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	_, stderr := mustRun(t, 1, dsn, "", "create", "tables", "--citus", "-y")
	if !strings.Contains(stderr, "CREATE EXTENSION citus") {
		t.Errorf("without the extension: %q", stderr)
	}
	made := mustQuery(t, mustOpen(t, dsn), `SELECT count(*) FROM pg_class
		WHERE relname LIKE '%_table' AND relnamespace = 'public'::regnamespace`)
	if made != "0" {
		t.Errorf("%s tables were made by a command that failed", made)
	}
}

func TestDryRunPrintsSQLThatWorks(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	script, _ := mustRun(t, 0, "", "", "create", "tables", "--dry-run", "--with-users",
		"--app-role", appRole.name, "-s", "dry run")
	if got := relations(t, db, "dry run"); got != "" {
		t.Fatalf("--dry-run created %q", got)
	}
	mustExec(t, db, script)
	mustExec(t, db, script) // it may be repeated
	printed := relations(t, db, "dry run")
	mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "-s", "really")
	if did := relations(t, db, "really"); did != printed || printed == "" {
		t.Errorf("--dry-run makes %q, create tables makes %q", printed, did)
	}
	s := mustAPI(t, dsn, "--schema", "dry run")
	s.must(t, 401, "GET", "/values", "", "")
}

func TestSchemaHoldsEverythingAndNothingElseIsDeleted(t *testing.T) { // S18
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	const schema = `Wind "Nord"` // needs quoting
	mustCreateTables(t, dsn, "--with-users", "--schema", schema)
	if got := relations(t, db, "public"); got != "" {
		t.Errorf("in public there is %q", got)
	}
	mustExec(t, db, `CREATE TABLE "Wind ""Nord""".mine (x int);
		CREATE VIEW "Wind ""Nord""".my_view AS SELECT 1 AS one`)
	s := mustAPI(t, dsn, "-s", schema)
	s.must(t, 401, "GET", "/values", "", "")
	mustCreateTables(t, dsn, "--with-users") // the same tables in public must survive too
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
	columns := mustQuery(t, db, `SELECT string_agg(attname, ' ') FROM pg_attribute
		WHERE attrelid = 'users_table'::regclass AND attnum > 0`)
	if columns != "x" {
		t.Errorf("the columns of users_table became %q", columns)
	}
}

func TestAppRoleCannotRewriteAnything(t *testing.T) { // S19
	t.Parallel()
	s, _ := mustTenant(t)
	app := mustOpen(t, asAppRole(s.dsn))
	type forbidden struct{ name, query string }
	cases := []forbidden{
		{"read a column of users_table", `SELECT created_at FROM users_table`},
		{"read all of users_table", `SELECT * FROM users_table`},
		{"delete users", `DELETE FROM users_table`},
		{"truncate users_table", `TRUNCATE users_table`},
		{"create a user", `INSERT INTO users_table (tenant_id, email, key_id, key_digest)
			VALUES (gen_random_uuid(), 'x', 'x', sha256('x'))`},
		{"add a column", `ALTER TABLE values_table ADD x int`},
		{"drop a table", `DROP TABLE values_table`},
		{"create a trigger", `CREATE TRIGGER x BEFORE INSERT ON runs_table
			EXECUTE FUNCTION suppress_redundant_updates_trigger()`},
	}
	columns := mustQuery(t, s.db, `SELECT string_agg(attname, ' ') FROM pg_attribute
		WHERE attrelid = 'users_table'::regclass AND attnum > 0 AND NOT attisdropped
			AND attname <> 'last_used_at'`)
	for _, column := range strings.Fields(columns) {
		query := `UPDATE users_table SET ` + column + ` = DEFAULT`
		cases = append(cases, forbidden{"update users_table." + column, query})
	}
	for _, table := range []string{"runs_table", "series_table", "values_table"} {
		cases = append(cases,
			forbidden{"update " + table, `UPDATE ` + table + ` SET tenant_id = tenant_id`},
			forbidden{"delete from " + table, `DELETE FROM ` + table},
			forbidden{"truncate " + table, `TRUNCATE ` + table + ` CASCADE`})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := app.Exec(c.query)
			if refusal := pq.As(err); refusal == nil || refusal.Code != "42501" {
				t.Errorf("%s: %v, want permission denied", c.query, err)
			}
		})
	}
	// The role may note when a key was last used.
	mustExec(t, app, `UPDATE users_table SET last_used_at = now() WHERE email = 'a@example.com'`)
}

// ---- Questions

// The cases build on each other: the tables and the user of the first serve the next ones.
func TestQuestionsAreAskedAndOnlyYesIsYes(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	tables := func(t testing.TB, db *sql.DB) string { return relations(t, db, "public") }
	const email = "ask@example.com"
	for _, c := range []struct {
		name  string
		args  []string
		state func(testing.TB, *sql.DB) string // what only a yes may change
		after []string                         // a command line that prepares the next case
	}{
		{"create tables", []string{"create", "tables", "--with-users"}, tables,
			[]string{"users", "create", "-t", tenantA, "-e", email}},
		{"users regenerate-key", []string{"users", "regenerate-key", "-e", email}, users, nil},
		{"users deactivate", []string{"users", "deactivate", "-e", email}, users, nil},
		{"delete tables", []string{"delete", "tables"}, tables, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := c.state(t, db)
			for _, answer := range []string{"", "n\n", "\n", "perhaps\n"} {
				_, stderr := mustRun(t, 1, dsn, answer, c.args...)
				if answer == "" && !strings.Contains(stderr, "-y") {
					t.Errorf("with nobody to ask it says %q, want -y in it", stderr)
				}
				if c.state(t, db) != before {
					t.Fatalf("the answer %q changed something", answer)
				}
			}
			mustRun(t, 0, dsn, "y\n", c.args...)
			if c.state(t, db) == before {
				t.Error("the answer y changed nothing")
			}
		})
		if c.after != nil {
			mustRun(t, 0, dsn, "", c.after...)
		}
	}
}

// ---- Users

// secretPart is most of a key's secret: what follows the prefix and the key_id, without the last three
// characters.
func secretPart(key string) string {
	return key[13:50]
}

func TestUsersCreateShowsTheKeyOnce(t *testing.T) { // S8
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "early@example.com") // no users_table yet
	mustCreateTables(t, dsn, "--with-users")

	stdout, _ := mustRun(t, 0, dsn, "", "users", "create",
		"--tenant-id", strings.ToUpper(tenantA), "--email", "Alice@example.com")
	found := regexp.MustCompile(`(?m)^API Key: (tdb_\S+)$`).FindStringSubmatch(stdout)
	if found == nil || !wellFormedKey(found[1]) {
		t.Fatalf("no line of the key alone: %q", stdout)
	}
	id := mustQuery(t, db, `SELECT user_id FROM users_table`)
	expectWords(t, stdout, id, tenantA, "Alice@example.com", "not be shown again")

	_, stderr := mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "aLICE@example.com")
	expectWords(t, stderr, "User with email 'aLICE@example.com' already exists for this tenant.")

	quiet, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantB, "-e", "Alice@example.com")
	if !wellFormedKey(strings.TrimSuffix(quiet, "\n")) {
		t.Errorf("-q prints %q, want the key alone", quiet)
	}

	dump := mustQuery(t, db, `SELECT string_agg(u::text, ' ') FROM users_table u`) // S6
	for _, key := range []string{found[1], quiet} {
		secret := secretPart(key)
		if strings.Contains(dump, secret) || strings.Contains(dump, hex.EncodeToString([]byte(secret))) {
			t.Errorf("users_table holds the key: %s", dump)
		}
	}
}

func TestAmbiguousOrUnknownEmailChangesNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	for _, tenant := range []string{tenantA, tenantB} {
		mustRun(t, 0, dsn, "", "users", "create", "-t", tenant, "-e", "both@example.com")
	}
	before := users(t, db)
	for _, line := range []string{"users deactivate -y", "users activate", "users regenerate-key -y"} {
		t.Run(line, func(t *testing.T) {
			_, stderr := mustRun(t, 1, dsn, "", strings.Fields(line+" -e both@example.com")...)
			expectWords(t, stderr, tenantA, tenantB, "--tenant-id")
			mustRun(t, 1, dsn, "", strings.Fields(line+" -e nobody@example.com")...)
			mustRun(t, 1, dsn, "", strings.Fields(line+" -e both@example.com -t "+nobody)...)
			if users(t, db) != before {
				t.Fatal("it changed something")
			}
		})
	}
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "BOTH@example.com", "-t", tenantB)
	if got := mustQuery(t, db, `SELECT tenant_id FROM users_table WHERE NOT is_active`); got != tenantB {
		t.Errorf("deactivated %q, want the user of tenant B", got)
	}
}

func TestUsersListShowsEveryUserAndNoSecret(t *testing.T) { // S8
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	var secrets []string
	for _, email := range []string{"on@example.com", "off@example.com"} {
		key, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantA, "-e", email)
		digest := sha256.Sum256([]byte(strings.TrimSpace(key)))
		secrets = append(secrets, secretPart(key),
			hex.EncodeToString(digest[:]), base64.StdEncoding.EncodeToString(digest[:]))
	}
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantB, "-e", "other@example.com")
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "off@example.com")
	ids := mustQuery(t, db, `SELECT string_agg(user_id || ' ' || key_id, ' ') FROM users_table
		WHERE tenant_id = $1`, tenantA)
	shown := append(strings.Fields(ids), tenantA, "on@example.com", "off@example.com")
	for _, c := range []struct {
		name, flags       string
		oneTenant, asJSON bool
	}{
		{"a table of all tenants", "", false, false},
		{"JSON of all tenants", "--json", false, true},
		{"include-inactive changes nothing", "--include-inactive", false, false},
		{"a table of one tenant", "-t " + tenantA, true, false},
		{"JSON of one tenant", "--json -t " + tenantA, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			stdout, _ := mustRun(t, 0, dsn, "", strings.Fields("users list "+c.flags)...)
			expectWords(t, stdout, shown...)
			for _, secret := range secrets {
				if strings.Contains(stdout, secret) {
					t.Errorf("it shows a key or a digest:\n%s", stdout)
				}
			}
			if strings.Contains(stdout, "other@example.com") == c.oneTenant {
				t.Errorf("it does not respect the tenant:\n%s", stdout)
			}
			if !c.asJSON {
				return
			}
			for _, u := range mustDecode[[]map[string]any](t, stdout) {
				if u["is_active"] != (u["email"] != "off@example.com") {
					t.Errorf("is_active is wrong: %v", u)
				}
			}
		})
	}
}

// ---- Starting the API

func TestAPIRefusesToStartUnsafely(t *testing.T) { // S19, S28
	t.Parallel()
	dsn := mustDatabase(t)
	app := asAppRole(dsn)
	cert, key := mustCertificate(t)
	mustCreateTables(t, dsn)

	// Without users_table, a network is served only if the operator says so.
	expectWords(t, mustNotServe(t, 1, app, "--host", "0.0.0.0"), "--allow-anonymous")
	mustAPI(t, dsn, "--host", "0.0.0.0", "--allow-anonymous")

	mustNotServe(t, 1, unreachable)

	// A certificate needs its key, and the two must not be swapped.
	mustNotServe(t, 2, app, "--tls-cert", cert)
	mustNotServe(t, 1, app, "--tls-cert", key, "--tls-key", cert)
}

// The operator is told what weakens the protection, and of nothing else.
func TestAPIWarnsOfWhatWeakensItsProtection(t *testing.T) { // S19, S28
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	app := asAppRole(dsn)
	mustCreateTables(t, dsn, "--with-users")
	cert, key := mustCertificate(t)
	network := []string{"--host", "0.0.0.0"}
	byTLS := slices.Concat(network, []string{"--tls-cert", cert, "--tls-key", key})
	for _, c := range []struct {
		name, dsn, grant string
		args             []string
		warning          string // a part of it; "" means that there must be no warning at all
	}{
		{"loopback", app, "", []string{"--host", "127.0.0.1"}, ""},
		{"a network in plain text", app, "", network, "plain text"},
		{"a network by TLS", app, "", byTLS, ""},
		{"an unverified connection to the database", mustSeemFar(t, app), "", nil, "sslmode=verify-full"},
		{"a role that may update a column", app, `UPDATE (annotation) ON values_table`, nil, "may rewrite"},
		{"a role that may delete", app, `DELETE ON runs_table`, nil, "may rewrite"},
		{"a role that may create users", app, `INSERT ON users_table`, nil, "may rewrite"},
		{"the owner of the tables", dsn, "", nil, "may rewrite"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.grant != "" {
				mustExec(t, db, `GRANT `+c.grant+` TO `+appRole.name)
				defer mustExec(t, db, `REVOKE `+c.grant+` FROM `+appRole.name)
			}
			s := mustAPIOn(t, dsn, c.dsn, c.args...)
			if code := s.stop(); code != 0 {
				t.Errorf("exit %d, want 0", code)
			}
			log := s.log.String()
			if warned := strings.Contains(log, "level=WARN"); warned != (c.warning != "") {
				t.Errorf("a warning: %v, want %v", warned, !warned)
			}
			expectWords(t, log, c.warning)
		})
	}
}

// mustSeemFar is the same database under a host name that is not local; hostaddr still leads to it.
func mustSeemFar(t testing.TB, dsn string) string {
	t.Helper()
	u := mustParse(t, dsn)
	addresses, err := net.LookupHost(u.Hostname())
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set("hostaddr", addresses[0])
	u.RawQuery = query.Encode()
	u.Host = net.JoinHostPort("db.example", u.Port())
	return u.String()
}

// mustCertificate makes a certificate of 127.0.0.1 and its key, in files.
func mustCertificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	signed, err := x509.CreateCertificate(cryptorand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return mustWritePEM(t, "CERTIFICATE", signed), mustWritePEM(t, "PRIVATE KEY", encoded)
}

// mustWritePEM writes one PEM block to a file and returns the file's name.
func mustWritePEM(t testing.TB, kind string, content []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "block.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content})
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// mustTrust is a pool with the certificate in a file.
func mustTrust(t testing.TB, cert string) *x509.CertPool {
	t.Helper()
	roots, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	trusted := x509.NewCertPool()
	if !trusted.AppendCertsFromPEM(roots) {
		t.Fatal("the certificate cannot be read")
	}
	return trusted
}

func TestTLSIsSpokenFromVersion12On(t *testing.T) { // S28
	t.Parallel()
	cert, private := mustCertificate(t)
	s, key := mustTenant(t, "--tls-cert", cert, "--tls-key", private)
	if !strings.HasPrefix(s.url, "https://") {
		t.Errorf("it serves %s", s.url)
	}
	trusted := mustTrust(t, cert)
	for _, c := range []struct {
		name    string
		version uint16
		works   bool
	}{
		{"TLS 1.0", tls.VersionTLS10, false},
		{"TLS 1.1", tls.VersionTLS11, false},
		{"TLS 1.2", tls.VersionTLS12, true},
		{"TLS 1.3", tls.VersionTLS13, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &tls.Config{RootCAs: trusted, MinVersion: c.version, MaxVersion: c.version}
			s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: config}}
			resp, _, err := s.do("GET", "/list_timeseries", key, "")
			if works := err == nil && resp.StatusCode == 200; works != c.works {
				t.Errorf("it works: %v, want %v: %v %v", works, c.works, resp, err)
			}
		})
	}
	t.Run("plain HTTP on the same port", func(t *testing.T) {
		resp, err := http.Get(strings.Replace(s.url, "https", "http", 1) + "/values")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("status %d, want 400", resp.StatusCode)
		}
	})
}

func TestMissingTablesAre503UntilTheyAreCreated(t *testing.T) { // S25
	t.Parallel()
	dsn := mustDatabase(t)
	s := mustAPI(t, dsn)
	const oneUpdate = `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":1}]}`
	for _, c := range []struct{ name, method, path, body string }{
		{"reading values", "GET", "/values", ""},
		{"listing series", "GET", "/list_timeseries", ""},
		{"uploading", "POST", "/upload", oneValue},
		{"updating", "PUT", "/values", oneUpdate},
		{"creating a series", "POST", "/series", `{"name":"x"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 503, c.method, c.path, "", c.body)
			if strings.Contains(text, "table") {
				t.Errorf("it tells of the database: %s", text)
			}
		})
	}
	mustCreateTables(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	s.must(t, 200, "GET", "/values", "", "")
}
